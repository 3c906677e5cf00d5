"""What is not retrieved is estimated instead of left out."""

from collections.abc import Mapping
from typing import ClassVar

from attrs import field, frozen
from torch import Tensor

from kvframe.stages.selector import Selector
from kvframe.types import Invariant, LayerLayout, LeavingUnits, Selection, StepInputs, UnitTable
from kvframe.validators import part


@frozen(kw_only=True)
class EstimateRest(Selector):
    """Another selector's selection; and every unit enters attention, with its tokens that are not attended, as one
    virtual entry: their number times exp(q . mean key), and the mean value.

    The estimate of RetroInfer (2025, arXiv 2505.02922), of all units instead of some. A unit of which some tokens are
    attended counts with the others. Needs a scorer that keeps mean keys and values.
    """

    name: ClassVar[str] = "estimate-rest"
    capturable: ClassVar[bool] = True
    estimates: ClassVar[bool] = True
    waives: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ATTENDED_ONLY})
    selector: Selector = field(validator=part(Selector))
    """Says what is retrieved."""

    @property
    def capacity(self) -> int:
        return self.selector.capacity

    def capacity_in(self, layout: LayerLayout) -> int:
        return self.selector.capacity_in(layout)

    @property
    def scales_channels(self) -> bool:
        return self.selector.scales_channels

    def row_index(
        self, keys: Tensor, values: Tensor, centres: Tensor, channels: Tensor | None = None
    ) -> dict[str, Tensor]:
        return self.selector.row_index(keys, values, centres, channels)

    def extend(self, row_index: Mapping[str, Tensor], unit: LeavingUnits, channels: Tensor | None = None) -> None:
        self.selector.extend(row_index, unit, channels)

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> Selection | tuple[Tensor, Tensor]:
        return self.selector.select(inputs, scores, units)
