"""Plain torch definition of `kmeans`."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Score tiles of this many tokens stay in a core's cache on a CPU; the result does not depend on it.
_TILE = 256


def kmeans_reference(
    keys: Tensor, num_clusters: int, num_iterations: int, max_cluster_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster mean-centred keys by cosine similarity; split what grew too large.

    keys: [N, T, D], N independent problems.
    Seeds are `num_clusters` evenly spaced tokens, so the same keys always give the same clusters. An empty cluster
    keeps its direction during the iterations and is left out of the result. A cluster of more than `max_cluster_size`
    tokens is cut into equal parts.

    Returns (order, sizes, num_units):
    order: int64 [N, T], tokens in unit order, ascending inside a unit;
    sizes: int64 [N, U] with U = num_clusters + T // max_cluster_size, zero behind the last unit;
    num_units: int64 [N].
    """
    num_tokens = keys.shape[1]
    points = keys.to(torch.promote_types(keys.dtype, torch.float32))
    points = F.normalize(points - points.mean(1, keepdim=True), dim=-1)
    seeds = torch.arange(num_clusters, device=keys.device) * num_tokens // num_clusters
    centroids = points[:, seeds]
    assignment = _assign(points, centroids)
    for _ in range(num_iterations):
        centroids = _update(points, assignment, centroids)
        assignment = _assign(points, centroids)
    return _cut_into_units(assignment, num_clusters, max_cluster_size)


def _assign(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the most similar centroid, [N, T]."""
    similar = centroids.transpose(1, 2)
    tiles = (points[:, start : start + _TILE] for start in range(0, points.shape[1], _TILE))
    return torch.cat([torch.matmul(tile, similar).max(-1).indices for tile in tiles], dim=1)


def _update(points: Tensor, assignment: Tensor, centroids: Tensor) -> Tensor:
    """Normalised mean of each cluster's members; an empty one keeps its centroid."""
    num_problems, num_clusters, _ = centroids.shape
    base = torch.arange(num_problems, device=points.device)[:, None] * num_clusters
    sums = torch.zeros_like(centroids).flatten(0, 1)
    sums.index_add_(0, (assignment + base).flatten(), points.flatten(0, 1))
    sums = sums.view_as(centroids)
    return torch.where(sums.abs().sum(-1, keepdim=True) > 0, F.normalize(sums, dim=-1), centroids)


def _cut_into_units(assignment: Tensor, num_clusters: int, max_size: int) -> tuple[Tensor, Tensor, Tensor]:
    num_problems, num_tokens = assignment.shape
    labels, order = assignment.sort(dim=1, stable=True)
    counts = torch.zeros(num_problems, num_clusters, dtype=torch.int64, device=assignment.device)
    counts.scatter_add_(1, assignment, torch.ones_like(assignment))
    starts = counts.cumsum(1) - counts
    # A cluster of n tokens becomes ceil(n / max) parts of ceil(n / parts) tokens, the last one perhaps shorter.
    parts = (counts + max_size - 1) // max_size
    part_size = (counts + parts.clamp(min=1) - 1) // parts.clamp(min=1)
    rank = torch.arange(num_tokens, device=assignment.device) - starts.gather(1, labels)
    part = rank // part_size.gather(1, labels).clamp(min=1)
    begins = torch.ones_like(labels, dtype=torch.bool)
    begins[:, 1:] = (labels[:, 1:] != labels[:, :-1]) | (part[:, 1:] != part[:, :-1])
    unit_ids = begins.cumsum(1) - 1
    sizes = torch.zeros(
        num_problems, num_clusters + num_tokens // max_size, dtype=torch.int64, device=assignment.device
    )
    sizes.scatter_add_(1, unit_ids, torch.ones_like(unit_ids))
    return order, sizes, unit_ids[:, -1] + 1
