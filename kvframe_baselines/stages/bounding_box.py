"""Scores by the box around a unit's keys: Quest's bound and ArkVale's digest."""

from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages import Scorer
from kvframe.stages.scorer import Index
from kvframe.types import LeavingUnits, StepInputs, UnitTable
from kvframe.validators import one_of


@frozen(kw_only=True)
class BoundingBox(Scorer):
    """Largest scaled product of the query with any point of a box around a unit's keys.

    The box "full" reaches from the smallest to the largest number in each channel, so that no key of the unit has a
    larger product: Quest (2024, arXiv 2406.10774). The box "mean-deviation" has the same centre and reaches, in each
    channel, as far as the keys are from it on average: ArkVale (NeurIPS 2024). It is no bound, and not stretched by a
    single outlier.
    """

    name: ClassVar[str] = "bounding-box"
    capturable: ClassVar[bool] = True
    box: Literal["full", "mean-deviation"] = field(default="full", validator=one_of("full", "mean-deviation"))
    """How far the box reaches from its centre."""
    group_reduction: Literal["mean", "max"] = field(default="mean", validator=one_of("mean", "max"))
    """How the query heads of a group become one."""
    softmax: bool = field(default=True, validator=one_of(True, False))
    """Normalise each query head over the units before the reduction."""

    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        """The upper corner and behind it the lower one, [M, num_units, 2 D]; zero for a unit without tokens."""
        from kvframe_kernels.unit_index import unit_bounds

        low, high = unit_bounds(keys, unit_ids, num_units)
        if self.box == "mean-deviation":
            centre = (low + high) / 2
            reach = _mean_distance(keys, unit_ids, centre)
            low, high = centre - reach, centre + reach
        return {"box": torch.cat([high, low], -1)}

    def extend(self, index: Index, unit: LeavingUnits) -> None:
        if self.box != "full":
            return super().extend(index, unit)
        from kvframe_kernels.unit_index import window_bounds

        high, low = index["box"].chunk(2, -1)
        window_bounds(
            low, high, unit.column, unit.leaves, unit.start, unit.size, unit.keys, unit.ring_first, unit.ring_size
        )

    def score(self, inputs: StepInputs, index: Index, units: UnitTable) -> Tensor:
        from kvframe_kernels.unit_scores import box_scores

        high, low = index["box"].chunk(2, -1)
        return box_scores(
            inputs.query,
            low,
            high,
            units.num_units,
            inputs.layout.sm_scale,
            reduction=self.group_reduction,
            softmax=self.softmax,
            due=inputs.due,
        )


def _mean_distance(keys: Tensor, unit_ids: Tensor, centre: Tensor) -> Tensor:
    """Mean of |key - centre| over each unit in each channel, [M, U, D]."""
    from kvframe_kernels.unit_index import unit_mean

    num_units = centre.shape[1]
    own = unit_ids.clamp(max=num_units - 1)[..., None].expand_as(keys)
    return unit_mean((keys - centre.gather(1, own)).abs(), unit_ids, num_units)
