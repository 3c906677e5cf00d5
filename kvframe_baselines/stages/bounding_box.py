"""Scores by the box around a unit's keys: Quest's bound and ArkVale's digest."""

from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages import Scorer
from kvframe.stages.scorer import Index
from kvframe.types import StepInputs, UnitTable
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
        low, high = (_extreme(keys, unit_ids, num_units, which) for which in ("amin", "amax"))
        if self.box == "mean-deviation":
            centre = (low + high) / 2
            reach = _mean_distance(keys, unit_ids, centre)
            low, high = centre - reach, centre + reach
        return {"box": torch.cat([high, low], -1)}

    def score(self, inputs: StepInputs, index: Index, units: UnitTable) -> Tensor:
        from kvframe_kernels.unit_scores import unit_scores

        # In each channel the upper corner gives the larger product where the query is positive, the lower one
        # elsewhere. So the bound is a plain product with the two parts of the query side by side.
        signed = torch.cat([inputs.query.clamp(min=0), inputs.query.clamp(max=0)], -1)
        return unit_scores(
            signed,
            index["box"],
            units.num_units,
            inputs.layout.sm_scale,
            reduction=self.group_reduction,
            softmax=self.softmax,
            due=inputs.due,
        )


def _extreme(keys: Tensor, unit_ids: Tensor, num_units: int, which: str) -> Tensor:
    """Smallest or largest number of each unit in each channel, [M, num_units, D]."""
    # The last place collects the tokens that belong to no unit.
    found = keys.new_zeros(keys.shape[0], num_units + 1, keys.shape[-1])
    place = unit_ids[..., None].expand_as(keys)
    return found.scatter_reduce(1, place, keys, which, include_self=False)[:, :num_units]


def _mean_distance(keys: Tensor, unit_ids: Tensor, centre: Tensor) -> Tensor:
    """Mean of |key - centre| over each unit in each channel, [M, U, D]."""
    from kvframe_kernels.unit_index import unit_mean

    num_units = centre.shape[1]
    own = unit_ids.clamp(max=num_units - 1)[..., None].expand_as(keys)
    return unit_mean((keys - centre.gather(1, own)).abs(), unit_ids, num_units)
