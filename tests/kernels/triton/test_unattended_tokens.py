"""The kernel of `unattended_tokens` against its reference."""

import pytest
import torch
from guard import guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from kvframe_kernels.dispatch import is_interpreted
from kvframe_kernels.unattended_tokens import triton_kernel as kernels
from kvframe_kernels.unattended_tokens import unattended_tokens, unattended_tokens_reference


def check_counts(
    device: torch.device, seed: int, heads: tuple[int, int], num_units: int, capacity: int, offsets_dtype: torch.dtype
) -> None:
    """The same numbers, and nothing behind them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0 if seed % 3 == 0 else 1, 7, (*heads, num_units), generator=generator)
    offsets = torch.zeros(*heads, num_units + 2, dtype=offsets_dtype)
    offsets[..., 1:-1] = sizes.cumsum(-1)
    offsets += 2
    last = int(offsets.max())
    counted = torch.randint(0, num_units + 1, heads, generator=generator)
    counted[0, 0] = num_units
    # Rows of units, of units that do not exist, of none, and empty slots.
    drawn = torch.rand(*heads, last + 5 + capacity, generator=generator).argsort(-1)[..., :capacity]
    rows = torch.where(drawn < last + 5, drawn, -1)
    offsets[torch.arange(num_units + 2) > counted[..., None]] = 4
    expected = unattended_tokens_reference(rows, offsets, counted, num_units)
    with guarded(device) as guard:
        rest = unattended_tokens(
            guard.copy(rows), guard.copy(offsets), guard.copy(counted), num_units, backend="triton"
        )

    assert rest.dtype == expected.dtype == torch.int32
    assert torch.equal(rest.cpu(), expected)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**16), heads=st.sampled_from([(1, 1), (2, 3)]),
    num_units=st.sampled_from([1, 2, 15, 33, 70]), capacity=st.sampled_from([1, 7, 16, 50]),
    offsets_dtype=st.sampled_from([torch.int32, torch.int64]), small=st.booleans(),
)  # fmt: skip
def test_counts_equal_reference(
    device: torch.device, seed: int, heads: tuple[int, int], num_units: int, capacity: int,
    offsets_dtype: torch.dtype, small: bool,
) -> None:  # fmt: skip
    """In one range of units or in several, whose bounds rows lie at."""
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(kernels, "_UNITS", 16)
            patch.setattr(kernels, "_ROWS", 16)
        check_counts(device, seed, heads, num_units, capacity, offsets_dtype)


@pytest.mark.skipif(is_interpreted(), reason="too large for the interpreter")
@pytest.mark.parametrize("num_units, capacity", [(8192, 1024), (8300, 1000), (40_000, 5000), (511, 4096)])
def test_counts_at_scale(device: torch.device, num_units: int, capacity: int) -> None:
    """As many units as a long context has."""
    check_counts(device, 1, (2, 8), num_units, capacity, torch.int32)


@pytest.mark.skipif(is_interpreted(), reason="needs a CUDA device")
def test_in_a_graph(device: torch.device) -> None:
    """Captured launches see the resident rows and units of their replay."""
    offsets = (16 * torch.arange(4098, device=device, dtype=torch.int32)).expand(2, 4, -1).contiguous()
    rows = torch.full((2, 4, 300), -1, dtype=torch.int64, device=device)
    num_units = torch.full((2, 4), 4096, device=device)

    def count() -> torch.Tensor:
        return unattended_tokens(rows, offsets, num_units, 4096, backend="triton")

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        count()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rest = count()
    for units in (4096, 1, 0, 777):
        num_units.fill_(units)
        rows.copy_(torch.rand(2, 4, 65_536).argsort(-1)[..., :300])
        graph.replay()
        assert torch.equal(rest, unattended_tokens_reference(rows, offsets, num_units, 4096))
