"""The kernels of `unit_scores` and `box_scores` against their references."""

import math

import pytest
import torch
from guard import guarded
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvframe_kernels.dispatch import KernelError, is_interpreted
from kvframe_kernels.unit_scores import box_scores, box_scores_reference, unit_scores, unit_scores_reference

# tl.dot of bfloat16 returns garbage in the interpreter.
DTYPES = [torch.float16, torch.float32] + ([] if is_interpreted() else [torch.bfloat16])


def check(
    device: torch.device, seed: int, dtypes: tuple[torch.dtype, torch.dtype], batch_size: int, num_kv_heads: int,
    group_size: int, max_units: int, width: int, reduction: str, softmax: bool, sized: bool, skipped: bool,
) -> None:  # fmt: skip
    """The kernels' result is the reference's in float64; centroids lie in a larger buffer, NaN behind the units."""
    generator = torch.Generator().manual_seed(seed)
    heads = (batch_size, num_kv_heads)
    query = torch.randn(batch_size, num_kv_heads * group_size, width, generator=generator).to(dtypes[0])
    centroids = torch.randn(*heads, max_units, width, generator=generator).to(dtypes[1])
    sizes = torch.randint(1, 99, (*heads, max_units), generator=generator).float().log() if sized else None
    num_units = torch.randint(0, max_units + 1, heads, generator=generator)
    num_units[0, 0] = max_units
    due = torch.rand(heads, generator=generator) < 0.6 if skipped else None
    scale, options = 1 / math.sqrt(width), {"reduction": reduction, "softmax": softmax}
    expected = unit_scores_reference(
        query.double(), centroids.double(), num_units, scale, **options, log_sizes=sizes
    )  # fmt: skip

    centroids = centroids.masked_fill((torch.arange(max_units) >= num_units[..., None])[..., None], math.nan)
    if skipped:
        centroids = centroids.masked_fill(~due[..., None, None], math.nan)
    with guarded(device) as guard:
        buffer = guard.poisoned(*heads, max_units + 3, width, dtype=dtypes[1])
        buffer[:, :, 1 : max_units + 1] = centroids.to(device)
        scores = unit_scores(
            guard.copy(query.transpose(0, 1)).transpose(0, 1),
            buffer[:, :, 1 : max_units + 1],
            guard.copy(num_units),
            scale,
            **options,
            log_sizes=None if sizes is None else guard.copy(sizes),
            due=None if due is None else guard.copy(due),
            backend="triton",
        )

    assert scores.dtype == torch.float32 and scores.shape == expected.shape
    scores, expected = scores.cpu().double(), expected.double()
    if due is not None:
        scores, expected = scores[due], expected[due]
    # Products of halves are exact in float32, so the tolerance is that of float32 for every dtype.
    torch.testing.assert_close(scores, expected, atol=2e-6 if softmax else 2e-5, rtol=1e-4)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    batch_size=st.integers(1, 2), num_kv_heads=st.integers(1, 3), group_size=st.integers(1, 5) | st.just(17),
    max_units=st.sampled_from([1, 2, 31, 64, 127, 128, 129, 300]), width=st.sampled_from([16, 80, 128]),
    reduction=st.sampled_from(["mean", "max"]), softmax=st.booleans(), sized=st.booleans(), skipped=st.booleans(),
)  # fmt: skip
@example(0, (torch.float16, torch.float16), 1, 1, 2, 1500, 16, "mean", True, True, False)
@example(0, (torch.float16, torch.float32), 1, 1, 33, 600, 256, "max", True, True, True)
def test_equals_reference(
    device: torch.device, seed: int, dtypes: tuple[torch.dtype, torch.dtype], batch_size: int, num_kv_heads: int,
    group_size: int, max_units: int, width: int, reduction: str, softmax: bool, sized: bool, skipped: bool,
) -> None:  # fmt: skip
    """At awkward sizes; neither what lies behind the units nor a head that is not due is read."""
    check(
        device, seed, dtypes, batch_size, num_kv_heads, group_size, max_units, width, reduction, softmax, sized, skipped
    )


@pytest.mark.skipif(is_interpreted(), reason="too large for the interpreter")
@pytest.mark.parametrize(
    "dtypes", [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize(
    "shape", [(1, 8, 4, 8192, 128), (4, 8, 4, 5001, 128), (1, 2, 7, 131_072, 64), (1, 1, 71, 3000, 256)]
)
@pytest.mark.parametrize(
    "options", [("mean", True, True, False), ("max", True, False, True), ("mean", False, True, True)]
)
def test_at_scale(
    device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, int, int, int, int],
    options: tuple[str, bool, bool, bool],
) -> None:  # fmt: skip
    """At the sizes of real layers."""
    check(device, 1, dtypes, *shape, *options)


def check_boxes(
    device: torch.device, seed: int, dtypes: tuple[torch.dtype, torch.dtype], batch_size: int, num_kv_heads: int,
    group_size: int, max_units: int, width: int, reduction: str, softmax: bool, skipped: bool, apart: bool,
) -> None:  # fmt: skip
    """As `check`, for boxes; with `apart` the two bounds lie in one buffer, otherwise in two."""
    generator = torch.Generator().manual_seed(seed)
    heads = (batch_size, num_kv_heads)
    query = torch.randn(batch_size, num_kv_heads * group_size, width, generator=generator).to(dtypes[0])
    keys = torch.randn(*heads, max_units, 2, width, generator=generator).to(dtypes[1])
    lower, upper = keys.amin(3), keys.amax(3)
    num_units = torch.randint(0, max_units + 1, heads, generator=generator)
    num_units[0, 0] = max_units
    due = torch.rand(heads, generator=generator) < 0.6 if skipped else None
    scale, options = 1 / math.sqrt(width), {"reduction": reduction, "softmax": softmax}
    expected = box_scores_reference(query.double(), lower.double(), upper.double(), num_units, scale, **options)

    hidden = torch.arange(max_units) >= num_units[..., None]
    if due is not None:
        hidden = hidden | ~due[..., None]
    with guarded(device) as guard:
        boxes = torch.stack([lower, upper]).masked_fill(hidden[None, ..., None], math.nan)
        if apart:
            low, up = guard.copy(boxes[0]), guard.copy(boxes[1])
        else:
            low, up = guard.copy(boxes.permute(1, 2, 3, 0, 4)).unbind(3)
        scores = box_scores(
            guard.copy(query), low, up, guard.copy(num_units), scale, **options,
            due=None if due is None else guard.copy(due), backend="triton",
        )  # fmt: skip

    assert scores.dtype == torch.float32 and scores.shape == expected.shape
    scores, expected = scores.cpu().double(), expected.double()
    if due is not None:
        scores, expected = scores[due], expected[due]
    torch.testing.assert_close(scores, expected, atol=2e-6 if softmax else 2e-5, rtol=1e-4)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    batch_size=st.integers(1, 2), num_kv_heads=st.integers(1, 3), group_size=st.integers(1, 5) | st.just(17),
    max_units=st.sampled_from([1, 31, 64, 129, 300]), width=st.sampled_from([16, 80, 128]),
    reduction=st.sampled_from(["mean", "max"]), softmax=st.booleans(), skipped=st.booleans(), apart=st.booleans(),
)  # fmt: skip
@example(0, (torch.float16, torch.float16), 1, 1, 33, 600, 128, "max", False, True, False)
@example(0, (torch.float16, torch.float16), 2, 1, 2, 1500, 16, "mean", False, False, True)
def test_boxes_equal_reference(
    device: torch.device, seed: int, dtypes: tuple[torch.dtype, torch.dtype], batch_size: int, num_kv_heads: int,
    group_size: int, max_units: int, width: int, reduction: str, softmax: bool, skipped: bool, apart: bool,
) -> None:  # fmt: skip
    """At awkward sizes; neither what lies behind the units nor a head that is not due is read."""
    check_boxes(
        device, seed, dtypes, batch_size, num_kv_heads, group_size, max_units, width, reduction, softmax, skipped, apart
    )


@pytest.mark.skipif(is_interpreted(), reason="too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 4, 8192, 128), (4, 8, 4, 5001, 128), (1, 1, 71, 3000, 256)])
@pytest.mark.parametrize(
    "options", [("mean", False, True, True), ("max", False, False, False), ("mean", True, True, True)]
)
def test_boxes_at_scale(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int, int],
    options: tuple[str, bool, bool, bool],
) -> None:  # fmt: skip
    """At the sizes of real layers."""
    check_boxes(device, 1, (dtype, dtype), *shape, *options)


def test_many_tiles(device: torch.device) -> None:
    """More tiles than the second kernel merges at a time."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 16, 16, generator=generator).half()
    centroids = torch.randn(1, 1, 33_000, 16, generator=generator).half()
    num_units = torch.tensor([[32_900]])
    expected = unit_scores_reference(query.double(), centroids.double(), num_units, 0.25)
    scores = unit_scores(query.to(device), centroids.to(device), num_units.to(device), 0.25, backend="triton")

    torch.testing.assert_close(scores.cpu().double(), expected, atol=1e-8, rtol=1e-4)


def test_large_products(device: torch.device) -> None:
    """Products whose exponentials overflow are normalised all the same."""
    query = torch.full((1, 1, 16), 1000.0, device=device)
    centroids = torch.tensor([1.0, 2.0, 2.0], device=device)[None, None, :, None].expand(1, 1, 3, 16).contiguous()
    scores = unit_scores(query, centroids, torch.tensor([[3]], device=device), 1.0, backend="triton")

    assert scores.tolist() == [[[0.0, 0.5, 0.5]]]


def test_not_served(device: torch.device) -> None:
    """A kernel asked for by name says what it does not serve."""
    query, centroids = torch.randn(1, 2, 16, device=device), torch.randn(1, 1, 4, 16, device=device)
    num_units = torch.tensor([[4]], device=device)
    with pytest.raises(KernelError, match="not torch.float64"):
        unit_scores(query.double(), centroids, num_units, 1.0, backend="triton")
    with pytest.raises(KernelError, match="multiples of 16"):
        unit_scores(query[..., :7], centroids[..., :7], num_units, 1.0, backend="triton")
    with pytest.raises(KernelError, match="side by side"):
        unit_scores(query, centroids.mT.contiguous().mT, num_units, 1.0, backend="triton")


@pytest.mark.skipif(is_interpreted(), reason="needs a CUDA device")
def test_in_a_graph(device: torch.device) -> None:
    """A captured launch sees the units of its replay, and leaves heads alone that are not due."""
    query = torch.randn(2, 8, 64, device=device, dtype=torch.float16)
    centroids = torch.randn(2, 2, 3000, 64, device=device, dtype=torch.float16)
    num_units = torch.full((2, 2), 3000, device=device)
    due = torch.ones(2, 2, dtype=torch.bool, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        unit_scores(query, centroids, num_units, 0.1, due=due, backend="triton")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = unit_scores(query, centroids, num_units, 0.1, due=due, backend="triton")
    num_units.copy_(torch.tensor([[0, 1], [2000, 2999]]))
    due.copy_(torch.tensor([[True, True], [False, True]]))
    scores.fill_(7.0)
    graph.replay()
    expected = unit_scores_reference(query, centroids, num_units, 0.1)

    assert (scores[~due] == 7).all()
    torch.testing.assert_close(scores[due], expected[due], atol=1e-6, rtol=1e-4)


def test_boxes_not_served(device: torch.device) -> None:
    """Bounds of two dtypes, or of numbers that lie apart."""
    query, bounds = torch.randn(1, 2, 16, device=device), torch.randn(1, 1, 4, 16, device=device)
    num_units = torch.tensor([[4]], device=device)
    with pytest.raises(KernelError, match="bounds of one dtype"):
        box_scores(query, bounds, bounds.half(), num_units, 1.0, backend="triton")
    with pytest.raises(KernelError, match="side by side"):
        box_scores(query, bounds.mT.contiguous().mT, bounds, num_units, 1.0, backend="triton")
