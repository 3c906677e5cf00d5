"""`unit_scores` and `box_scores` against their definitions, in Python floats."""

import math

import pytest
import torch
from helpers import dot
from hypothesis import given
from hypothesis import strategies as st

from kvframe_kernels.dispatch import KernelError, is_interpreted
from kvframe_kernels.unit_scores import box_scores, unit_scores


def softmax(values: list[float]) -> list[float]:
    """Of at least one value."""
    top = max(values)
    exponentials = [math.exp(value - top) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def score_head(
    queries: list[list[float]],
    centroids: list[list[float]],
    log_sizes: list[float],
    sm_scale: float,
    reduction: str,
    normalised: bool,
) -> list[float]:
    """Scores of one KV head's units for the query heads of its group."""
    units = list(zip(centroids, log_sizes))
    products = [[sm_scale * dot(query, centroid) + size for centroid, size in units] for query in queries]
    if normalised and centroids:
        products = [softmax(row) for row in products]
    columns = list(zip(*products, strict=True))
    return [max(column) if reduction == "max" else sum(column) / len(column) for column in columns]


@given(
    batch_size=st.integers(1, 2),
    num_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 3),
    head_dim=st.sampled_from([1, 4, 7]),
    max_units=st.integers(1, 12) | st.sampled_from([63, 111]),
    reduction=st.sampled_from(["mean", "max"]),
    normalised=st.booleans(),
    sized=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_definition(
    batch_size: int,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    max_units: int,
    reduction: str,
    normalised: bool,
    sized: bool,
    seed: int,
):
    """Products, softmax over the units that exist, then the reduction over the group; -inf where there is no unit."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch_size, num_kv_heads * group_size, head_dim, generator=generator, dtype=torch.float64)
    shape = (batch_size, num_kv_heads, max_units)
    centroids = torch.randn(*shape, head_dim, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 9, shape, generator=generator).double()
    num_units = torch.randint(0, max_units + 1, shape[:2], generator=generator)
    centroids[torch.arange(max_units) >= num_units[..., None]] = 1e3  # what lies there is nobody's
    scores = unit_scores(
        query,
        centroids,
        num_units,
        0.37,
        reduction=reduction,
        softmax=normalised,
        log_sizes=sizes.log() if sized else None,
    )

    assert scores.shape == shape
    for batch in range(batch_size):
        for head in range(num_kv_heads):
            count = int(num_units[batch, head])
            expected = score_head(
                query[batch, head * group_size : (head + 1) * group_size].tolist(),
                centroids[batch, head, :count].tolist(),
                [math.log(size) if sized else 0.0 for size in sizes[batch, head, :count].tolist()],
                0.37,
                reduction,
                normalised,
            )
            assert scores[batch, head, :count].tolist() == pytest.approx(expected, abs=1e-12)
            assert (scores[batch, head, count:] == -math.inf).all()


@given(
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    group_size=st.integers(1, 3),
    head_dim=st.sampled_from([1, 4, 7]),
    max_units=st.integers(1, 12),
    reduction=st.sampled_from(["mean", "max"]),
    normalised=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_box_definition(
    heads: tuple[int, int],
    group_size: int,
    head_dim: int,
    max_units: int,
    reduction: str,
    normalised: bool,
    seed: int,
):
    """The larger product of every column, summed; then as above. No key inside a box has a larger product."""
    generator = torch.Generator().manual_seed(seed)
    batch_size, num_kv_heads = heads
    query = torch.randn(batch_size, num_kv_heads * group_size, head_dim, generator=generator, dtype=torch.float64)
    keys = torch.randn(*heads, max_units, 5, head_dim, generator=generator, dtype=torch.float64)
    lower, upper = keys.amin(3), keys.amax(3)
    num_units = torch.randint(0, max_units + 1, heads, generator=generator)
    scores = box_scores(query, lower, upper, num_units, 0.37, reduction=reduction, softmax=normalised)

    assert scores.shape == (*heads, max_units)
    for batch, head in torch.cartesian_prod(*map(torch.arange, heads)).tolist():
        count = int(num_units[batch, head])
        queries = query[batch, head * group_size : (head + 1) * group_size].tolist()
        boxes = list(zip(lower[batch, head, :count].tolist(), upper[batch, head, :count].tolist()))
        bounds = [
            [0.37 * sum(max(q * low, q * up) for q, low, up in zip(one, *box, strict=True)) for box in boxes]
            for one in queries
        ]
        for one, row in zip(queries, bounds, strict=True):
            for unit, bound in enumerate(row):
                assert all(0.37 * dot(one, key) <= bound + 1e-12 for key in keys[batch, head, unit].tolist())
        if normalised and count:
            bounds = [softmax(row) for row in bounds]
        columns = list(zip(*bounds, strict=True))
        expected = [max(column) if reduction == "max" else sum(column) / len(column) for column in columns]
        assert scores[batch, head, :count].tolist() == pytest.approx(expected, abs=1e-12)
        assert (scores[batch, head, count:] == -math.inf).all()


def test_large_products():
    """Products whose exponentials overflow are normalised all the same."""
    query = torch.tensor([[[1000.0]]])
    centroids = torch.tensor([[[[1.0], [2.0], [2.0]]]])
    scores = unit_scores(query, centroids, torch.tensor([[3]]), 1.0)

    assert scores.tolist() == [[[0.0, 0.5, 0.5]]]


def test_precision():
    """Half precision queries are scored in the index's float32."""
    query = torch.ones(1, 2, 4, dtype=torch.bfloat16)
    scores = unit_scores(query, torch.randn(1, 1, 5, 4), torch.tensor([[5]]), 1.0)

    assert scores.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_index(dtype: torch.dtype):
    """An index in half precision is scored in float32, as if it had been float32 all along."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 16, generator=generator).to(dtype)
    centroids = torch.randn(2, 2, 9, 16, generator=generator).to(dtype)
    num_units = torch.tensor([[9, 3], [0, 1]])
    scores = unit_scores(query, centroids, num_units, 0.25)

    assert torch.equal(scores, unit_scores(query.float(), centroids.float(), num_units, 0.25))
    assert scores.dtype == torch.float32


def test_due():
    """A head that is due is scored whatever the others are."""
    query, centroids, num_units = torch.randn(2, 4, 16), torch.randn(2, 2, 9, 16), torch.tensor([[9, 3], [0, 1]])
    due = torch.tensor([[True, False], [True, True]])
    scores = unit_scores(query, centroids, num_units, 0.25, due=due)

    assert torch.equal(scores[due], unit_scores(query, centroids, num_units, 0.25)[due])


@pytest.mark.skipif(is_interpreted(), reason="the interpreter runs it")
def test_backend():
    """A kernel that cannot run here is an error."""
    with pytest.raises(KernelError, match="its tensors lie on the CPU"):
        unit_scores(torch.randn(1, 1, 16), torch.randn(1, 1, 4, 16), torch.tensor([[4]]), 1.0, backend="triton")
