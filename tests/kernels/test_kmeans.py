"""`kmeans` and `write_in_order` against their definitions, in Python floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvframe_kernels.kmeans import kmeans, write_in_order
from kvframe_kernels.kmeans import reference as kmeans_reference

Point = list[float]


def normalise(point: Point) -> Point:
    """At length one; zero stays zero."""
    length = math.sqrt(sum(x * x for x in point))
    return [x / length for x in point] if length > 0 else point


def cluster(keys: list[Point], num_clusters: int, num_iterations: int) -> list[int]:
    """The cluster of every key."""
    count = len(keys)
    mean = [math.fsum(column) / count for column in zip(*keys, strict=True)]
    points = [normalise([x - m for x, m in zip(key, mean, strict=True)]) for key in keys]
    centroids = [points[i * count // num_clusters] for i in range(num_clusters)]

    def nearest(point: Point) -> int:
        similar = [sum(x * c for x, c in zip(point, centroid, strict=True)) for centroid in centroids]
        return similar.index(max(similar))

    labels = [nearest(point) for point in points]
    for _ in range(num_iterations):
        for i in range(num_clusters):
            members = [point for point, label in zip(points, labels, strict=True) if label == i]
            total = [sum(column) for column in zip(*members, strict=True)]
            if any(total):
                centroids[i] = normalise(total)
        labels = [nearest(point) for point in points]
    return labels


def units_of(labels: list[int], num_clusters: int, max_size: int) -> list[list[int]]:
    """Clusters in order, those that are too large in equal parts."""
    units = []
    for i in range(num_clusters):
        members = [token for token, label in enumerate(labels) if label == i]
        if members:
            size = math.ceil(len(members) / math.ceil(len(members) / max_size))
            units += [members[start : start + size] for start in range(0, len(members), size)]
    return units


def split(order: torch.Tensor, sizes: torch.Tensor, num_units: torch.Tensor) -> list[list[int]]:
    """One head's units out of what the op returns; behind the last one there are only zeros."""
    count = int(num_units)
    assert (sizes[:count] > 0).all() and (sizes[count:] == 0).all()
    parts = order.split(sizes[:count].tolist())
    return [part.tolist() for part in parts]


@given(
    num_tokens=st.integers(1, 40) | st.sampled_from([63, 64, 111]),
    share=st.floats(0, 1),
    num_iterations=st.integers(0, 4),
    max_size=st.integers(1, 12) | st.just(1000),
    num_heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 4]),
    seed=st.integers(0, 2**16),
)
def test_definition(
    num_tokens: int, share: float, num_iterations: int, max_size: int, num_heads: int, head_dim: int, seed: int
):
    """Units are the split clusters of a spherical k-means from evenly spaced seeds, every head on its own."""
    num_clusters = max(1, round(share * min(num_tokens, 20)))
    keys = torch.randn(
        num_heads, num_tokens, head_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    if head_dim == 1:
        keys = keys.abs()  # in one dimension all cosines are 1 or -1: ties everywhere
        num_clusters = 1
    before = keys.clone()
    order, sizes, num_units = kmeans(keys, num_clusters, num_iterations, max_size)

    assert torch.equal(keys, before)
    assert order.dtype == sizes.dtype == num_units.dtype == torch.int64
    assert sizes.shape == (num_heads, num_clusters + num_tokens // max_size)
    for head in range(num_heads):
        labels = cluster(keys[head].tolist(), num_clusters, num_iterations)
        assert split(order[head], sizes[head], num_units[head]) == units_of(labels, num_clusters, max_size)


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 100])
def test_equal_keys(num_tokens: int):
    """Keys that do not differ lie in the first cluster, which is split as any other."""
    keys = torch.full((2, num_tokens, 5), 3.25)
    order, sizes, num_units = kmeans(keys, min(4, num_tokens), 3, 7)

    expected = units_of([0] * num_tokens, 1, 7)
    assert all(split(*head) == expected for head in zip(order, sizes, num_units, strict=True))


@given(copies=st.integers(2, 30), num_clusters=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_repeated_keys(copies: int, num_clusters: int, seed: int):
    """Seeds that are the same key leave empty clusters; every token still has its one unit."""
    few = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed))
    keys = few.repeat(1, copies, 1)
    order, sizes, num_units = kmeans(keys, num_clusters, 2, 8)

    units = split(order[0], sizes[0], num_units[0])
    assert sorted(token for unit in units for token in unit) == list(range(3 * copies))
    assert all(unit == sorted(unit) and len(unit) <= 8 for unit in units)


def test_empty_cluster_keeps_its_direction():
    """Of two equal seeds the second has no members; it wins some once the first has moved away."""
    keys = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, -1.0], [-2.0, 0.0], [0.0, -1.0]]])

    def units(num_iterations: int) -> list[list[int]]:
        order, sizes, num_units = kmeans(keys, 3, num_iterations, 6)
        return split(order[0], sizes[0], num_units[0])

    assert units(0) == [[0, 1, 2, 3, 5], [4]]
    assert units(1) == [[3, 5], [0, 1, 2], [4]]


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch):
    """How many tokens are scored at once changes nothing."""
    keys = torch.randn(2, 111, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = kmeans(keys, 9, 3, 5)
    monkeypatch.setattr(kmeans_reference, "_TILE", 10)

    assert all(torch.equal(one, other) for one, other in zip(whole, kmeans(keys, 9, 3, 5), strict=True))


def test_half_precision_is_clustered_in_float32():
    """Sixteen bits hold the keys, not the arithmetic."""
    keys = torch.randn(2, 90, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    half, single = kmeans(keys, 7, 5, 20), kmeans(keys.float(), 7, 5, 20)

    assert all(torch.equal(one, other) for one, other in zip(half, single, strict=True))


@given(
    num_problems=st.integers(1, 3),
    num_tokens=st.integers(0, 12),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dtype=st.sampled_from([torch.float16, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_write_in_order(num_problems: int, num_tokens: int, widths: tuple[int, int], dtype: torch.dtype, seed: int):
    """A row is the key and the value of its token; without such a token it stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_tokens, num_problems, widths[0], generator=generator).to(dtype).transpose(0, 1)
    values = torch.randn(num_problems, num_tokens, widths[1], generator=generator).to(dtype)
    order = torch.randint(-1, num_tokens + 1, (num_problems, num_tokens), generator=generator)
    whole = torch.full((num_problems, num_tokens, 2, sum(widths)), torch.nan, dtype=dtype)
    write_in_order(keys, values, order, whole[:, :, 0])

    assert whole[:, :, 1].isnan().all()
    for problem in range(num_problems):
        for row, token in enumerate(order[problem].tolist()):
            written = whole[problem, row, 0]
            if 0 <= token < num_tokens:
                assert written.tolist() == keys[problem, token].tolist() + values[problem, token].tolist()
            else:
                assert written.isnan().all()
