"""Prompt units: clusters of similar keys."""

from typing import ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages import UnitBuilder
from kvframe.types import Decision, LayerLayout, StepInputs, Units
from kvframe.validators import integer
from kvframe_kernels.kmeans import kmeans


@frozen(kw_only=True)
class ClusterUnits(UnitBuilder):
    """k-means clusters of the prompt's keys, for every KV head on its own; never clustered again.

    Spherical: mean-centred keys, cosine assignment, seeds at evenly spaced tokens, so that the same prompt always gives
    the same clusters (as in ClusterKV, arXiv 2412.03213, and RetroInfer, arXiv 2505.02922). The prompt is clustered in
    blocks, which makes the cost linear in its length. What comes after the prompt is cut into runs of `cluster_size`
    tokens.
    """

    name: ClassVar[str] = "clusters"
    capturable: ClassVar[bool] = True
    cluster_size: int = field(default=16, validator=integer(at_least=1))
    """Tokens of an average cluster."""
    block_size: int = field(default=8192, validator=integer(at_least=1))
    """Prompt tokens clustered at once."""
    num_iterations: int = field(default=10, validator=integer(at_least=0))
    """Updates of the centroids."""
    split_factor: int = field(default=4, validator=integer(at_least=1))
    """A cluster of more than this many times the average size is split."""

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
        orders, sizes, counts = [], [], []
        for start in range(0, keys.shape[1], self.block_size):
            block = keys[:, start : start + self.block_size]
            num_clusters = max(1, block.shape[1] // self.cluster_size)
            order, size, count = kmeans(block, num_clusters, self.num_iterations, self.split_factor * self.cluster_size)
            orders.append(order + start)
            sizes.append(size)
            counts.append(count)
        order = torch.cat(orders, 1)
        if len(sizes) == 1:
            return Units(order=order, sizes=sizes[0], num_units=counts[0])
        return Units(order=order, sizes=_pack(torch.cat(sizes, 1)), num_units=torch.stack(counts).sum(0))

    def init(self, layout: LayerLayout) -> None:
        return None

    def boundary(self, inputs: StepInputs, decision: Decision, state: None) -> None:
        return None


def _pack(sizes: Tensor) -> Tensor:
    """Zeros between the blocks' units go behind the last unit; the units keep their order."""
    place = (sizes == 0).to(torch.uint8).sort(dim=1, stable=True).indices
    return sizes.gather(1, place)
