"""The kernels of `sketch_scores` and `window_sketch` against their references."""

import math

import pytest
import torch
from guard import guarded
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvframe_kernels.dispatch import KernelError, is_interpreted
from kvframe_kernels.key_sketch import (
    Centres,
    Sketch,
    decode_sketch,
    encode_sketch,
    sketch_scores,
    sketch_scores_reference,
    window_sketch,
    window_sketch_reference,
)

# tl.dot of bfloat16 returns garbage in the interpreter.
DTYPES = [torch.float16, torch.float32] + ([] if is_interpreted() else [torch.bfloat16])


def behind_is_wild(unit_ids: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Units that there are none of, behind the last candidate."""
    return unit_ids.masked_fill(torch.arange(unit_ids.shape[-1]) >= count[..., None], 1 << 30)


def check_scores(
    device: torch.device, seed: int, dtype: torch.dtype, heads: tuple[int, int], group_size: int, num_candidates: int,
    num_units: int, width: int, bits: int, centred: bool, skipped: bool, channelled: bool, kept: bool,
) -> None:  # fmt: skip
    """The kernels' result is the reference's in float64; NaN in units, codes of rows and numbers that nobody may
    read."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    sizes = torch.randint(1, 6, (*heads, num_units), generator=generator)
    offsets = torch.zeros(*heads, num_units + 2, dtype=torch.int32)
    offsets[..., 1:-1] = sizes.cumsum(-1)
    offsets += 3
    counted = torch.randint(1, num_units + 1, heads, generator=generator)
    stop = offsets.gather(-1, counted[..., None].long()).long()  # of the rows of units that exist
    offsets[torch.arange(num_units + 2) > counted[..., None]] = 1
    num_rows = int(stop.max()) + 1
    # Powers of two: their products with queries are exact in every dtype.
    channels = 2.0 ** torch.randint(-3, 4, (*heads, width), generator=generator) if channelled else None
    sketch = encode_sketch(randn(*heads, num_rows, width), bits, channels=channels)
    means, query = randn(*heads, num_units, width), randn(heads[0], heads[1] * group_size, width)
    rows = torch.rand(*heads, num_rows, generator=generator).masked_fill(torch.arange(num_rows) < 3, 2)
    rows = rows.masked_fill(torch.arange(num_rows) >= stop, 2).argsort(-1)
    rows = torch.nn.functional.pad(rows[..., :num_candidates], (0, max(0, num_candidates - num_rows)))
    most = (stop[..., 0] - 3).clamp(max=num_candidates)
    count = (torch.rand(heads, generator=generator) * (most + 1)).long()
    count[0, 0] = most[0, 0]
    due = torch.rand(heads, generator=generator) < 0.6 if skipped else None
    clean = Sketch(sketch.codes, sketch.step.double())
    bounds = offsets[..., :num_units].masked_fill(torch.arange(num_units) >= counted[..., None], 1 << 30)
    unit_ids = torch.searchsorted(bounds.contiguous(), rows.int(), right=True) - 1
    centres = Centres(means.double(), unit_ids) if centred else None
    # As much as the candidates have together, more or less.
    lse = torch.randn(query.shape[:2], generator=generator) + math.log(num_candidates) if kept else None
    expected = sketch_scores_reference(
        query.double(), rows, count, clean, bits, 0.3, channels=channels, centres=centres, kept_lse=lse, due=due
    )

    means = means.masked_fill((torch.arange(num_units) >= counted[..., None])[..., None], math.nan)
    rows = rows.masked_fill(torch.arange(num_candidates) >= count[..., None], 1 << 40)
    with guarded(device) as guard:
        buffer = guard.poisoned(*heads, num_units + 2, width, dtype=dtype)
        buffer[:, :, 1:-1] = means.to(device)
        scores = sketch_scores(
            guard.copy(query.transpose(0, 1)).transpose(0, 1),
            guard.copy(rows),
            guard.copy(count),
            Sketch(*(guard.copy(part) for part in sketch)),
            bits,
            0.3,
            channels=None if channels is None else guard.copy(channels),
            centres=Centres(buffer[:, :, 1:-1], guard.copy(behind_is_wild(unit_ids, count))) if centred else None,
            kept_lse=None if lse is None else guard.copy(lse),
            due=None if due is None else guard.copy(due),
            backend="triton",
        )

    assert scores.dtype == torch.float32 and scores.shape == expected.shape
    scores = scores.cpu().double()
    if due is not None:
        scores, expected = scores[due], expected[due]
    # Levels and products of halves are exact in float32, so the tolerance is that of float32 for every dtype.
    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=1e-4)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES), heads=st.sampled_from([(1, 1), (2, 2)]),
    group_size=st.integers(1, 5), num_candidates=st.sampled_from([1, 3, 63, 65, 100]),
    num_units=st.sampled_from([1, 7, 33]), width=st.sampled_from([16, 48, 80]), bits=st.sampled_from([2, 4, 8]),
    centred=st.booleans(), skipped=st.booleans(), channelled=st.booleans(), kept=st.booleans(),
)  # fmt: skip
@example(1, torch.float16, (1, 2), 19, 70, 20, 32, 4, True, False, True, True)
def test_scores_equal_reference(
    device: torch.device, seed: int, dtype: torch.dtype, heads: tuple[int, int], group_size: int, num_candidates: int,
    num_units: int, width: int, bits: int, centred: bool, skipped: bool, channelled: bool, kept: bool,
) -> None:  # fmt: skip
    """At awkward sizes; buffers keep their surroundings."""
    check_scores(
        device, seed, dtype, heads, group_size, num_candidates, num_units, width, bits, centred, skipped, channelled,
        kept,
    )  # fmt: skip


@pytest.mark.skipif(is_interpreted(), reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, bits, centred",
    [
        (((1, 8), 4, 4096, 8300, 128), 4, True),
        (((1, 8), 1, 4096, 8300, 128), 8, False),
        (((2, 4), 7, 3001, 2000, 256), 2, True),
        (((1, 2), 17, 700, 900, 96), 4, False),
    ],
)
def test_scores_at_scale(
    device: torch.device, shape: tuple[tuple[int, int], int, int, int, int], bits: int, centred: bool,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """At the sizes of real layers."""
    check_scores(device, bits, dtype, *shape, bits, centred, skipped=True, channelled=centred, kept=centred)


def check_window(
    device: torch.device, seed: int, dtype: torch.dtype, heads: tuple[int, int], max_size: int, width: int, bits: int,
    centred: bool, channelled: bool,
) -> None:  # fmt: skip
    """Bit for bit: sums of these numbers are exact in any order, and everything else is rounded in one way."""
    generator = torch.Generator().manual_seed(seed)
    ring_size, first, num_rows = max_size + 3, 2, 4 * max_size + 9
    buffer = torch.randint(-99, 100, (*heads, first + ring_size, width), generator=generator).to(dtype) / 8
    start = torch.randint(0, num_rows, heads, generator=generator)
    size = torch.randint(1, max_size + 1, heads, generator=generator)
    leaves = torch.rand(heads, generator=generator) < 0.7
    leaves[0, 0] = True
    channels = torch.rand(*heads, width, generator=generator) + 0.1 if channelled else None
    before = encode_sketch(torch.randn(*heads, num_rows, width, generator=generator).to(dtype), bits)
    expected = Sketch(*(part.clone() for part in before))
    window_sketch_reference(
        expected, bits, leaves, start, size, buffer, first, ring_size, centred=centred, channels=channels
    )

    age = torch.arange(ring_size) - start[..., None]
    slots = torch.zeros(*heads, first + ring_size, dtype=torch.bool)
    slots[..., first:] = (age % ring_size < size[..., None]) & leaves[..., None]
    buffer = buffer.masked_fill(~slots[..., None], math.nan)
    with guarded(device) as guard:
        sketch = Sketch(*(guard.copy(part) for part in before))
        window_sketch(
            sketch, bits, guard.copy(leaves), guard.copy(start), guard.copy(size), guard.copy(buffer), first, ring_size,
            centred=centred, channels=None if channels is None else guard.copy(channels), backend="triton",
        )  # fmt: skip

    assert torch.equal(sketch.step.cpu(), expected.step)
    assert torch.equal(sketch.codes.cpu(), expected.codes)


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES), heads=st.sampled_from([(1, 1), (2, 3)]),
    max_size=st.sampled_from([1, 5, 16, 21]), width=st.sampled_from([16, 80, 128]), bits=st.sampled_from([2, 4, 8]),
    centred=st.booleans(), channelled=st.booleans(),
)  # fmt: skip
def test_window_equals_reference(
    device: torch.device, seed: int, dtype: torch.dtype, heads: tuple[int, int], max_size: int, width: int, bits: int,
    centred: bool, channelled: bool,
) -> None:  # fmt: skip
    """At awkward sizes, round the end of the ring and of the rows; nothing else is touched or read."""
    check_window(device, seed, dtype, heads, max_size, width, bits, centred, channelled)


@pytest.mark.skipif(is_interpreted(), reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, max_size, width", [(4, 64, 128), (8, 257, 256), (2, 1000, 64)])
def test_window_at_scale(device: torch.device, dtype: torch.dtype, bits: int, max_size: int, width: int) -> None:
    """At the sizes of real layers, and of a whole ring."""
    check_window(device, bits, dtype, (2, 8), max_size, width, bits, centred=True, channelled=True)


def test_random_keys(device: torch.device) -> None:
    """Of numbers with all their digits: each within half a step of its level."""
    generator = torch.Generator().manual_seed(3)
    buffer = torch.randn(1, 2, 20, 48, generator=generator)
    sketch = Sketch(
        torch.zeros(1, 2, 30, 24, dtype=torch.uint8, device=device), torch.zeros(1, 2, 30, 1, device=device)
    )
    leaves, start = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[3, 11]])
    arguments = [tensor.to(device) for tensor in (leaves, start, torch.tensor([[17, 19]]), buffer)]
    window_sketch(sketch, 4, *arguments, 0, 20, centred=True, backend="triton")
    restored = decode_sketch(sketch, 4, 48).cpu()
    for head, (low, size) in enumerate(((3, 17), (11, 19))):
        keys = buffer[0, head, torch.arange(low, low + size) % 20]
        error = (restored[0, head, low : low + size] - (keys - keys.mean(0))).abs()
        assert (error <= 0.5001 * sketch.step[0, head, low : low + size].cpu()).all()


def test_not_served(device: torch.device) -> None:
    """A kernel asked for by name says what it does not serve."""
    keys = torch.randn(1, 1, 5, 16, device=device)
    sketch = encode_sketch(keys, 4)
    rows, count = torch.zeros(1, 1, 2, dtype=torch.int64, device=device), torch.ones(1, 1, dtype=torch.int64)
    centres = Centres(keys.half(), rows)
    with pytest.raises(KernelError, match="not torch.float64"):
        sketch_scores(keys[:, :, 0].double(), rows, count, sketch, 4, 1.0, backend="triton")
    with pytest.raises(KernelError, match="one dtype"):
        sketch_scores(keys[:, :, 0], rows, count, sketch, 4, 1.0, centres=centres, backend="triton")
    flags, number = count.bool(), count
    with pytest.raises(KernelError, match="side by side"):
        window_sketch(sketch, 4, flags, number, number, keys.mT.contiguous().mT, 0, 5, centred=True, backend="triton")
