"""`unattended_tokens` and `rest_attention` against their definitions, in Python numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvframe_kernels.rest_attention import rest_attention, unattended_tokens


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    num_units=st.integers(0, 6),
    first=st.integers(0, 3),
    resident=st.sets(st.integers(0, 40), max_size=12),
    data=st.data(),
)
def test_unattended_tokens(sizes: list[int], num_units: int, first: int, resident: set[int], data: st.DataObject):
    """Of every unit, the rows that are not resident; empty slots, and rows of no unit, do not count."""
    num_units = min(num_units, len(sizes))
    slots = data.draw(st.permutations([*resident, *[-1] * 3]), label="slots")
    bounds = [first + sum(sizes[:unit]) for unit in range(num_units + 1)]
    # What stands behind the last unit means nothing.
    offsets = bounds + data.draw(st.lists(st.integers(0, 50), min_size=3 + len(sizes), max_size=3 + len(sizes)))
    rest = unattended_tokens(
        torch.tensor([[slots]]), torch.tensor([[offsets]]), torch.tensor([[num_units]]), len(sizes) + 1
    )
    expected = [len(set(range(*bounds[unit : unit + 2])) - resident) for unit in range(num_units)]

    assert rest.tolist() == [[expected + [0] * (len(sizes) + 1 - num_units)]]


@given(
    heads=st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]),
    num_queries=st.integers(1, 3),
    num_units=st.integers(1, 7),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**16),
)
def test_rest_attention(heads: tuple[int, int], num_queries: int, num_units: int, widths: tuple[int, int], seed: int):
    """Softmax over one entry a unit, counted as often as tokens are missing of it; with nothing missing the result is
    0, of no weight."""
    num_kv_heads, group_size = heads
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    query = randn(num_kv_heads * group_size, num_queries, widths[0])
    keys, values = (randn(num_kv_heads, num_units, width) for width in widths)
    rest = torch.randint(0, 5, (2, num_kv_heads, num_units), generator=generator)
    rest[torch.rand(2, num_kv_heads, generator=generator) < 0.3] = 0
    keys[rest == 0] = 50.0
    out, lse = rest_attention(query, keys, values, rest, 0.4)

    for batch in range(2):
        for qo_head in range(num_kv_heads * group_size):
            head = qo_head // group_size
            for t in range(num_queries):
                entries = [
                    (
                        count
                        * math.exp(0.4 * math.fsum(x * y for x, y in zip(query[batch, qo_head, t].tolist(), key))),
                        value,
                    )
                    for key, value, count in zip(
                        keys[batch, head].tolist(), values[batch, head].tolist(), rest[batch, head].tolist()
                    )
                    if count
                ]
                total = math.fsum(weight for weight, _ in entries)
                if not entries:
                    assert lse[batch, qo_head, t] == -math.inf and not out[batch, qo_head, t].any()
                    continue
                mean = [math.fsum(weight * value[d] for weight, value in entries) / total for d in range(widths[1])]
                assert lse[batch, qo_head, t].item() == pytest.approx(math.log(total), abs=1e-12)
                assert out[batch, qo_head, t].tolist() == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision(dtype: torch.dtype):
    """Results are in float32, from numbers in the dtype of a model."""
    keys = torch.ones(1, 1, 3, 4, dtype=dtype)
    out, lse = rest_attention(keys[:, :, :1], keys, keys, torch.tensor([[[1, 2, 5]]]), 1.0)

    assert out.dtype == lse.dtype == torch.float32
    assert lse.item() == pytest.approx(4 + math.log(8), abs=1e-6)
