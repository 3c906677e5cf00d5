"""A selector around another one."""

from collections.abc import Mapping

from attrs import field, frozen
from torch import Tensor

from kvframe.stages.selector import Selector
from kvframe.types import Candidates, LayerLayout, LeavingUnits, Selection, StepInputs, UnitTable
from kvframe.validators import part


@frozen(kw_only=True)
class SelectorAround(Selector):
    """What selectors that change another one's selection have in common: as it stands here, it is the other's.

    Whether it `ranks` is left to each of them: one that changes `select` has to change `choose` as well.
    """

    selector: Selector = field(validator=part(Selector))
    """Selects first."""

    @property
    def estimates(self) -> bool:  # type: ignore[override]
        return self.selector.estimates

    @property
    def needs_means(self) -> bool:
        return self.estimates or self.selector.needs_means

    @property
    def capacity(self) -> int:
        return self.selector.capacity

    def budget_in(self, layout: LayerLayout) -> int:
        return self.selector.budget_in(layout)

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

    def candidates(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> Candidates:
        return self.selector.candidates(inputs, scores, units)

    def choose(
        self, inputs: StepInputs, candidates: Candidates, scores: Tensor, units: UnitTable
    ) -> Selection | tuple[Tensor, Tensor]:
        return self.selector.choose(inputs, candidates, scores, units)
