"""The kernel of `query_turned` against its reference."""

import torch
from guard import guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from kvframe_kernels.query_similarity import query_turned


@settings(max_examples=25)
@given(
    batch_size=st.integers(1, 3), num_kv_heads=st.integers(1, 5), group_size=st.integers(1, 5),
    width=st.sampled_from([3, 16, 80, 128]), per_kv_head=st.booleans(), with_turned=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.bfloat16]), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_reference(
    device: torch.device, batch_size: int, num_kv_heads: int, group_size: int, width: int, per_kv_head: bool,
    with_turned: bool, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    """The same decisions and the same memory, for queries whose similarity is not within rounding of tau."""
    generator = torch.Generator().manual_seed(seed)
    num_qo_heads = num_kv_heads * group_size
    states = torch.randn(2, batch_size, num_qo_heads, 2, width, generator=generator).to(dtype)
    query, previous = states[0, :, :, 0].to(device), states[1, :, :, 0].to(device)
    turned = states[1, :, :, 1].to(device) if with_turned else None
    first = torch.rand(batch_size, num_kv_heads, generator=generator).to(device) < 0.2
    tau = 0.013 + 0.1 * (seed % 5 - 2)
    options = {"num_kv_heads": num_kv_heads, "per_kv_head": per_kv_head, "turned": turned}

    with guarded(device) as guard:
        expected_previous, expected_first = previous.clone(), first.clone()
        expected = query_turned(
            query, expected_previous, expected_first, tau, **options, backend="reference"
        )  # fmt: skip
        previous, first = guard.copy(previous), guard.copy(first)
        due = query_turned(query, previous, first, tau, **options, backend="triton")

    assert torch.equal(due, expected)
    assert torch.equal(previous, query) and torch.equal(expected_previous, query)
    assert not first.any() and not expected_first.any()
