"""Prompt units: clusters of similar keys."""

from typing import ClassVar

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from kvframe.stages.units import UnitBuilder
from kvframe.types import Decision, LayerLayout, StepInputs, Units
from kvframe.validators import integer


@frozen(kw_only=True)
class ClusterUnits(UnitBuilder):
    """k-means clusters of the prompt's keys, for every KV head on its own; never clustered again.

    Spherical: mean-centred keys, cosine assignment, seeds at evenly spaced tokens, so that the same prompt always gives
    the same clusters (as in ClusterKV, arXiv 2412.03213, and RetroInfer, arXiv 2505.02922). Clustered in blocks, a
    prompt costs time linear in its length. What comes after the prompt is cut into runs of `cluster_size` tokens.
    """

    name: ClassVar[str] = "clusters"
    capturable: ClassVar[bool] = True
    cluster_size: int = field(default=16, validator=integer(at_least=1))
    """Tokens of an average cluster."""
    block_size: int | None = field(default=8192, validator=integer(at_least=1, or_none=True))
    """Prompt tokens clustered at once; None for all that come at once."""
    num_iterations: int = field(default=10, validator=integer(at_least=0))
    """Updates of the centroids."""
    split_factor: int | None = field(default=4, validator=integer(at_least=1, or_none=True))
    """A cluster of more than this many times the average size is split; None for never."""

    @property
    def unit_size(self) -> int:
        return self.cluster_size

    @property
    def min_size(self) -> int:
        return self.cluster_size

    @property
    def max_size(self) -> int:
        return self.cluster_size

    def build(self, keys: Tensor) -> Units:
        num_heads, num_tokens, width = keys.shape
        block_size = num_tokens if self.block_size is None else self.block_size
        num_full = num_tokens // block_size
        stop = num_full * block_size
        parts = []
        if num_full:
            # All whole blocks side by side: each is a problem of its own, and many small ones keep a device busy.
            blocks = keys[:, :stop].reshape(num_heads * num_full, block_size, width)
            parts.append(self._cluster(blocks, num_heads))
        if stop < num_tokens:
            parts.append(self._cluster(keys[:, stop:], num_heads))
        if len(parts) == 2:
            parts[1] = evolve(parts[1], order=parts[1].order + stop)
        order = torch.cat([units.order for units in parts], 1)
        sizes = torch.cat([units.sizes for units in parts], 1)
        if num_full + len(parts) > 2:
            sizes = _pack(sizes)
        return Units(order=order, sizes=sizes, num_units=torch.stack([units.num_units for units in parts]).sum(0))

    def _cluster(self, blocks: Tensor, num_heads: int) -> Units:
        """Units of blocks [num_heads * n, T, D]; those of a head one behind the other, with gaps between the blocks."""
        from kvframe_kernels.kmeans import kmeans

        num_tokens = blocks.shape[1]
        num_clusters = max(1, num_tokens // self.cluster_size)
        longest = num_tokens if self.split_factor is None else self.split_factor * self.cluster_size
        order, sizes, num_units = kmeans(blocks, num_clusters, self.num_iterations, longest)
        starts = torch.arange(blocks.shape[0] // num_heads, device=order.device) * num_tokens
        order = order.view(num_heads, -1, num_tokens) + starts[:, None]
        return Units(
            order=order.flatten(1), sizes=sizes.view(num_heads, -1), num_units=num_units.view(num_heads, -1).sum(1)
        )

    def init(self, layout: LayerLayout) -> None:
        return None

    def boundary(self, inputs: StepInputs, decision: Decision, state: None) -> None:
        return None


def _pack(sizes: Tensor) -> Tensor:
    """Zeros between the blocks' units go behind the last unit; the units keep their order."""
    place = (sizes == 0).to(torch.uint8).sort(dim=1, stable=True).indices
    return sizes.gather(1, place)
