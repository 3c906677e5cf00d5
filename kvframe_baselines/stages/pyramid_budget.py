"""Budgets that shrink from the bottom layer to the top one."""

from typing import ClassVar

from attrs import field, frozen
from torch import Tensor

from kvframe.stages import Selector
from kvframe.stages.selector import best_rows
from kvframe.types import LayerLayout, StepInputs, UnitTable
from kvframe.validators import integer


@frozen(kw_only=True)
class PyramidBudget(Selector):
    """Units in score order until the layer's budget is filled; budgets fall linearly from layer to layer: PyramidKV
    (2024, arXiv 2406.02069).

    The top layer gets `token_budget` / `beta`, the bottom one as much above the mean as the top one is below it.
    """

    name: ClassVar[str] = "pyramid-budget"
    capturable: ClassVar[bool] = True
    token_budget: int = field(default=1024, validator=integer(at_least=1))
    """Tokens that a head retrieves on average over the layers, where there are as many."""
    beta: int = field(default=20, validator=integer(at_least=1))
    """How many times more the mean is than the top layer's budget."""
    room: int = field(default=0, validator=integer(at_least=0))
    """Tokens that leave the window after a selection and are attended all the same, until the next one chooses among
    them: the first so many."""

    @property
    def capacity(self) -> int:
        return self.token_budget

    def capacity_in(self, layout: LayerLayout) -> int:
        return self.budget_in(layout) + self.room

    def budget_in(self, layout: LayerLayout) -> int:
        """Tokens that a head of this layer retrieves."""
        mean, layers_above = self.token_budget, layout.num_layers - 1
        if layers_above == 0:
            return mean
        above_mean = mean - mean / self.beta
        return max(1, round(mean + above_mean * (1 - 2 * layout.layer_idx / layers_above)))

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> tuple[Tensor, Tensor]:
        return best_rows(inputs, scores, units, self.budget_in(inputs.layout), self.room)
