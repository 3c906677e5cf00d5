"""Plain torch definitions of `kmeans` and `write_in_order`."""

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
    return cut_into_units(assignment, num_clusters, max_cluster_size)


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


def cut_into_units(assignment: Tensor, num_clusters: int, max_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `kmeans_reference` returns, from the cluster of every token, integers [N, T]."""
    num_tokens = assignment.shape[1]
    # Narrow labels sort in fewer passes.
    narrow = torch.int16 if num_clusters <= torch.iinfo(torch.int16).max else torch.int32
    labels, order = assignment.to(narrow).sort(dim=1, stable=True)
    labels = labels.long()
    edges = _edges(labels, num_clusters)
    starts, counts = edges[:, :-1], edges.diff(dim=1)
    # A cluster of n tokens becomes ceil(n / max) parts of ceil(n / parts) tokens, the last one perhaps shorter.
    parts = (counts + max_size - 1) // max_size
    part_size = (counts + parts.clamp(min=1) - 1) // parts.clamp(min=1)
    rank = torch.arange(num_tokens, device=assignment.device) - starts.gather(1, labels)
    part = rank // part_size.gather(1, labels).clamp(min=1)
    begins = torch.ones_like(labels, dtype=torch.bool)
    begins[:, 1:] = (labels[:, 1:] != labels[:, :-1]) | (part[:, 1:] != part[:, :-1])
    unit_ids = begins.cumsum(1) - 1
    sizes = _edges(unit_ids, num_clusters + num_tokens // max_size).diff(dim=1)
    return order, sizes, unit_ids[:, -1] + 1


def _edges(labels: Tensor, count: int) -> Tensor:
    """Where the run of each of `count` ascending labels begins, and the end of the last, [N, count + 1]."""
    wanted = torch.arange(count + 1, device=labels.device).repeat(labels.shape[0], 1)
    return torch.searchsorted(labels, wanted)


def write_in_order_reference(keys: Tensor, values: Tensor, order: Tensor, out: Tensor) -> None:
    """Write rows out in cluster order, a token's key and value side by side, in place.

    keys: [N, T, D]; values: [N, T, Dv]; order: int64 [N, T], the token of each row; out: [N, T, D + Dv], maybe on the
    host: out[n, i] = keys[n, order[n, i]] | values[n, order[n, i]].
    A row whose token is not in [0, T) stays as it is.
    """
    num_tokens = keys.shape[1]
    valid = ((order >= 0) & (order < num_tokens))[..., None]
    token = order.clamp(0, max(0, num_tokens - 1))[..., None]
    first = 0
    for source in (keys, values):
        part = out[..., first : first + source.shape[-1]]
        rows = source.gather(1, token.expand(-1, -1, source.shape[-1]))
        part.copy_(torch.where(valid, rows.to(out.dtype), part.to(rows.device)))
        first += source.shape[-1]
