"""Slot three: how relevant is a unit now?"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

from attrs import field, frozen
from torch import Tensor

from kvframe.stages.base import Slot, Stage
from kvframe.types import StepInputs
from kvframe.validators import one_of

Index = Mapping[str, Tensor]


class Scorer(Stage):
    """What stands for a unit, and how well that fits the current query."""

    slot: ClassVar[Slot] = "scorer"

    @abstractmethod
    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        """Summaries of units.

        keys: [M, T, D], values: [M, T, Dv], M independent heads; unit_ids: int64 [M, T], the unit of each token,
        `num_units` for a token of none.
        Returns named tensors [M, num_units, ...], one entry a unit; the names and trailing shapes are always the same.
        """

    @abstractmethod
    def score(self, inputs: StepInputs, index: Index, unit_sizes: Tensor, num_units: Tensor) -> Tensor:
        """Relevance of every unit, higher is better.

        index: the tensors of `index` as [B, H, U, ...]; unit_sizes: int64 [B, H, U]; num_units: int64 [B, H].
        Returns [B, H, U] in at least float32, -inf for units that do not exist.
        """


@frozen(kw_only=True)
class MeanKey(Scorer):
    """Scaled product of the query with a unit's mean key, made one score per KV head.

    With the defaults this is the group-consistent score of LouisKV (arXiv 2510.11292): softmax over the units for every
    query head, then the mean over the heads that share a KV head. For units of one token it is the exact attention
    score.
    """

    name: ClassVar[str] = "mean-key"
    group_reduction: Literal["mean", "max"] = field(default="mean", validator=one_of("mean", "max"))
    """How the query heads of a group become one."""
    softmax: bool = field(default=True, validator=one_of(True, False))
    """Normalise each query head over the units before the reduction."""
    size_term: bool = field(default=False, validator=one_of(True, False))
    """Add log(unit size), so that the softmax estimates the attention mass of a whole unit."""

    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        from kvframe_kernels.unit_index import unit_mean

        return {"mean_key": unit_mean(keys, unit_ids, num_units)}

    def score(self, inputs: StepInputs, index: Index, unit_sizes: Tensor, num_units: Tensor) -> Tensor:
        from kvframe_kernels.unit_scores import unit_scores

        centroids = index["mean_key"]
        return unit_scores(
            inputs.query,
            centroids,
            num_units,
            inputs.layout.sm_scale,
            reduction=self.group_reduction,
            softmax=self.softmax,
            log_sizes=unit_sizes.clamp(min=1).to(centroids.dtype).log() if self.size_term else None,
        )
