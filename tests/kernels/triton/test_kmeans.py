"""The kernels of `kmeans` and `write_in_order` against their references."""

import pytest
import torch
import torch.nn.functional as F
from guard import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvframe_kernels.dispatch import KernelError
from kvframe_kernels.kmeans import kmeans, write_in_order

Clusters = tuple[Tensor, Tensor, Tensor]


def make_keys(shape: tuple[int, int, int], num_directions: int, noise: float, seed: int) -> Tensor:
    """Keys around a few directions, every second row of a larger tensor."""
    generator = torch.Generator().manual_seed(seed)
    num_problems, num_tokens, width = shape
    directions = torch.randn(num_problems, num_directions, width, generator=generator)
    chosen = torch.randint(0, num_directions, (2 * num_tokens,), generator=generator)
    keys = directions[:, chosen] + noise * torch.randn(num_problems, 2 * num_tokens, width, generator=generator)
    return (keys + 0.5)[:, ::2]


def check_units(clusters: Clusters, num_tokens: int, num_clusters: int, max_size: int) -> None:
    """Every token is in one unit, ascending inside it; sizes are zero behind the last unit."""
    order, sizes, num_units = clusters
    assert sizes.shape[1] == num_clusters + num_tokens // max_size
    assert torch.equal(order.sort(1).values, torch.arange(num_tokens, device=order.device).expand_as(order))
    assert (sizes.sum(1) == num_tokens).all() and int(sizes.max()) <= max_size
    exists = torch.arange(sizes.shape[1], device=sizes.device) < num_units[:, None]
    assert torch.equal(sizes > 0, exists)
    unit = unit_of_row(clusters)
    assert ((order[:, 1:] > order[:, :-1]) | (unit[:, 1:] > unit[:, :-1])).all()


def unit_of_row(clusters: Clusters) -> Tensor:
    """The unit of each row of the order, [N, T]."""
    order, sizes, _ = clusters
    rows = torch.arange(order.shape[1], device=order.device).expand_as(order).contiguous()
    return torch.searchsorted(sizes.cumsum(1), rows, right=True)


def objective(keys: Tensor, clusters: Clusters) -> float:
    """Sum over the tokens of the cosine with the mean direction of their unit."""
    order, sizes, _ = clusters
    points = keys.double() - keys.double().mean(1, keepdim=True)
    points = F.normalize(points, dim=-1).gather(1, order[..., None].expand(-1, -1, keys.shape[-1]))
    unit = unit_of_row(clusters)[..., None].expand_as(points)
    sums = points.new_zeros(*sizes.shape, keys.shape[-1]).scatter_add_(1, unit, points)
    return float((points * F.normalize(sums, dim=-1).gather(1, unit)).sum())


@settings(max_examples=30)
@given(
    num_problems=st.integers(1, 2), num_tokens=st.sampled_from([1, 2, 15, 64, 65, 130]), share=st.floats(0.02, 0.6),
    width=st.sampled_from([16, 48, 128]), num_iterations=st.integers(0, 3), max_size=st.sampled_from([1, 7, 1000]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_reference(
    device: torch.device, num_problems: int, num_tokens: int, share: float, width: int, num_iterations: int,
    max_size: int, seed: int,
) -> None:  # fmt: skip
    """In float32 the kernels find the clusters of the reference."""
    num_clusters = max(1, round(share * num_tokens))
    # Random directions of such width are far from ties.
    keys = make_keys((num_problems, num_tokens, width), max(1, num_tokens // 3), 0.5, seed).to(device)
    before = keys.clone()
    clusters = kmeans(keys, num_clusters, num_iterations, max_size, backend="triton")
    expected = kmeans(keys, num_clusters, num_iterations, max_size, backend="reference")

    assert torch.equal(keys, before)
    check_units(clusters, num_tokens, num_clusters, max_size)
    for one, other in zip(clusters, expected, strict=True):
        assert one.dtype == torch.int64
        assert torch.equal(one, other)


@settings(max_examples=12)
@given(
    num_tokens=st.sampled_from([3, 128, 150, 300]), num_clusters=st.sampled_from([1, 3, 64, 70]),
    width=st.sampled_from([16, 80, 256]), seed=st.integers(0, 99),
)  # fmt: skip
def test_half_precision(device: torch.device, num_tokens: int, num_clusters: int, width: int, seed: int) -> None:
    """Points of sixteen bits make clusters as good as the reference's, the same ones in every run."""
    num_clusters = min(num_clusters, num_tokens)
    keys = make_keys((2, num_tokens, width), 5, 0.05, seed).to(device, torch.float16)
    clusters = kmeans(keys, num_clusters, 2, 1000, backend="triton")
    again = kmeans(keys, num_clusters, 2, 1000, backend="triton")
    expected = kmeans(keys, num_clusters, 2, 1000, backend="reference")

    check_units(clusters, num_tokens, num_clusters, 1000)
    assert objective(keys, clusters) == pytest.approx(objective(keys, expected), rel=1e-3)
    assert all(torch.equal(one, other) for one, other in zip(clusters, again, strict=True))


def test_many_clusters(device: torch.device) -> None:
    """More clusters and tokens than one tile of the counting sort holds."""
    keys = make_keys((1, 1100, 16), 700, 0.1, 0).to(device)
    clusters = kmeans(keys, 530, 1, 1000, backend="triton")
    again = kmeans(keys, 530, 1, 1000, backend="triton")
    expected = kmeans(keys, 530, 1, 1000, backend="reference")

    check_units(clusters, 1100, 530, 1000)
    assert objective(keys, clusters) == pytest.approx(objective(keys, expected), rel=1e-4)
    assert all(torch.equal(one, other) for one, other in zip(clusters, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_ties_go_to_the_lowest_cluster(device: torch.device, dtype: torch.dtype) -> None:
    """Of equal seeds, in one tile or in several, the first wins all tokens; so it is where all keys are equal."""
    one = torch.zeros(16).index_fill_(0, torch.tensor([0]), 1.0)
    other = torch.zeros(16).index_fill_(0, torch.tensor([1]), 1.0)
    keys = torch.stack([one, other]).repeat(1, 70, 1).to(device, dtype)
    order, sizes, num_units = kmeans(keys, 140, 0, 200, backend="triton")
    assert order[0].tolist() == [*range(0, 140, 2), *range(1, 140, 2)]
    assert sizes[0, :2].tolist() == [70, 70] and num_units.tolist() == [2]

    keys = torch.full((2, 20, 16), 3.25, dtype=dtype, device=device)
    order, sizes, num_units = kmeans(keys, 4, 2, 20, backend="triton")
    assert sizes[:, 0].tolist() == [20, 20] and num_units.tolist() == [1, 1]
    assert torch.equal(order, torch.arange(20, device=device).expand(2, -1))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter
def test_keys_that_are_not_finite(device: torch.device) -> None:
    """They spoil the clusters of their own problem, never the form of the result."""
    keys = make_keys((2, 40, 16), 4, 0.1, 0).to(device)
    expected = kmeans(keys, 5, 2, 9, backend="triton")
    keys[0, 3] = torch.nan
    clusters = kmeans(keys, 5, 2, 9, backend="triton")

    check_units(clusters, 40, 5, 9)
    assert all(torch.equal(one[1], other[1]) for one, other in zip(clusters, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_tokens, num_clusters, width", [(8192, 512, 128), (5000, 333, 80), (2000, 100, 256)])
def test_at_size(device: torch.device, dtype: torch.dtype, num_tokens: int, num_clusters: int, width: int) -> None:
    """Blocks of a real prompt, as good as the reference's clusters and the same ones in every run."""
    if device.type == "cpu":
        pytest.skip("too large for the interpreter")
    keys = make_keys((8, num_tokens, width), 300, 0.3, 0).to(device, dtype)
    clusters = kmeans(keys, num_clusters, 10, num_tokens)
    again = kmeans(keys, num_clusters, 10, num_tokens, backend="triton")
    expected = kmeans(keys, num_clusters, 10, num_tokens, backend="reference")

    check_units(clusters, num_tokens, num_clusters, num_tokens)
    assert objective(keys, clusters) == pytest.approx(objective(keys, expected), rel=1e-3)
    assert all(torch.equal(one, other) for one, other in zip(clusters, again, strict=True))


@pytest.mark.parametrize("dtype, width", [(torch.float64, 16), (torch.float32, 24), (torch.float32, 272)])
def test_what_is_not_served(device: torch.device, dtype: torch.dtype, width: int) -> None:
    """The kernels, asked for by name, refuse other dtypes and widths."""
    keys = torch.ones(1, 4, width, dtype=dtype, device=device)
    order = torch.zeros(1, 4, dtype=torch.int64, device=device)
    with pytest.raises(KernelError, match="kernels serve"):
        kmeans(keys, 2, 1, 4, backend="triton")
    with pytest.raises(KernelError, match="kernels serve"):
        write_in_order(keys, keys, order, torch.cat([keys, keys], -1), backend="triton")
    with pytest.raises(KernelError, match="side by side"):
        kmeans(torch.ones(1, 16, 32, device=device).mT, 2, 1, 4, backend="triton")


@settings(max_examples=12)
@given(
    num_problems=st.integers(1, 3), num_tokens=st.sampled_from([0, 1, 5, 32, 70]),
    widths=st.sampled_from([(16, 16), (48, 128), (256, 16)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), invalid=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_write_in_order(
    device: torch.device, num_problems: int, num_tokens: int, widths: tuple[int, int], dtype: torch.dtype,
    invalid: bool, seed: int,
) -> None:  # fmt: skip
    """Rows are copies; those of a token that does not exist, and what lies between rows, stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_tokens, num_problems, widths[0], generator=generator).to(device, dtype).transpose(0, 1)
    values = torch.randn(num_problems, num_tokens, 2, widths[1], generator=generator).to(device, dtype)[:, :, 1]
    order = torch.rand(num_problems, num_tokens, generator=generator).argsort(1)
    if invalid and num_tokens:
        order[-1, 0], order[0, -1] = -1, num_tokens
    order = order.to(device)
    with guarded(device) as guard:
        whole = guard.poisoned(num_problems, num_tokens, 2, sum(widths), dtype=dtype)
        write_in_order(keys, values, order, whole[:, :, 1], backend="triton")
    expected = torch.full_like(whole, torch.nan)
    write_in_order(keys, values, order, expected[:, :, 1], backend="reference")

    torch.testing.assert_close(whole, expected, rtol=0, atol=0, equal_nan=True)


def test_write_in_order_to_the_host(device: torch.device) -> None:
    """Rows may go straight into pinned memory, in large numbers."""
    if device.type == "cpu":
        pytest.skip("needs a CUDA device")
    keys, values = torch.randn(2, 4, 5000, 128, device=device, dtype=torch.bfloat16).unbind()
    order = torch.rand(4, 5000, device=device).argsort(1)
    with guarded(device) as guard:
        out = guard.poisoned(4, 5000, 256, dtype=torch.bfloat16, pinned=True)
        write_in_order(keys, values, order, out, backend="triton")
    expected = torch.full_like(out, torch.nan)
    write_in_order(keys, values, order, expected, backend="reference")

    assert torch.equal(out, expected)
    assert torch.equal(out[1, 7], torch.cat([keys[1, order[1, 7]], values[1, order[1, 7]]]).cpu())
