"""One budget for all heads of a layer."""

from typing import ClassVar, TypeVar

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages import Selector
from kvframe.types import Invariant, LayerLayout, StepInputs, UnitTable
from kvframe.validators import integer, share

NumberT = TypeVar("NumberT", float, Tensor)


@frozen(kw_only=True)
class SharedBudget(Selector):
    """Heads of a layer share a budget by their scores: Ada-KV (2024, arXiv 2407.11550).

    The best tokens of all heads together, as many as the heads' budgets add up to, say how many each head would get;
    a share `floor` of that is replaced by the even budget, so that no head goes without, and fractions are dropped.
    Then every head takes its own best units, the last one cut to fit. Scores of different heads must be comparable, as
    shares of attention are.
    """

    name: ClassVar[str] = "shared-budget"
    capturable: ClassVar[bool] = True
    waives: ClassVar[frozenset[Invariant]] = frozenset({Invariant.EXACT_BUDGET})
    token_budget: int = field(default=1024, validator=integer(at_least=1))
    """Tokens that a head retrieves on average, where there are as many."""
    floor: float = field(default=0.2, validator=share)
    """Part of the budget that every head has to itself."""
    room: int = field(default=0, validator=integer(at_least=0))
    """Tokens that leave the window after a selection and are attended all the same, until the next one chooses among
    them: the first so many."""

    @property
    def capacity(self) -> int:
        return self.token_budget

    def capacity_in(self, layout: LayerLayout) -> int:
        return self._most(layout) + self.room

    def _most(self, layout: LayerLayout) -> int:
        """What a head gets that all others leave everything to."""
        return int(self._with_floor(float(self.token_budget * layout.num_kv_heads)))

    def _with_floor(self, adaptive: NumberT) -> NumberT:
        """Between the adaptive budgets and the even one, to be rounded down."""
        # What rounding takes from a whole number must not cost a token.
        return (1 - self.floor) * adaptive + (self.floor * self.token_budget + 1e-6)

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> tuple[Tensor, Tensor]:
        batch_size, num_kv_heads, num_units = scores.shape
        capacity = self.capacity_in(inputs.layout)
        ranked, order = scores.sort(dim=-1, descending=True, stable=True)
        offsets = units.offsets.long()
        starts = offsets[..., :num_units].gather(-1, order)
        sizes = offsets[..., 1 : num_units + 1].gather(-1, order) - starts
        sizes = sizes.masked_fill(ranked == -torch.inf, 0)
        ends = sizes.cumsum(-1)
        budgets = self._budgets(ranked, sizes)
        count = torch.minimum(ends[..., -1], budgets)
        places = torch.arange(capacity, device=scores.device).expand(batch_size, num_kv_heads, -1).contiguous()
        rank = torch.searchsorted(ends, places, right=True).clamp(max=num_units - 1)
        rows = starts.gather(-1, rank) + places - (ends - sizes).gather(-1, rank)
        return rows.masked_fill(places >= count[..., None], -1), count

    def _budgets(self, scores: Tensor, sizes: Tensor) -> Tensor:
        """int64 [B, H], tokens each head may take; scores and sizes [B, H, U]."""
        num_kv_heads = scores.shape[1]
        order = scores.flatten(1).sort(dim=-1, descending=True, stable=True).indices
        ordered = sizes.flatten(1).gather(-1, order)
        before = ordered.cumsum(-1) - ordered
        taken = torch.minimum(ordered, (self.token_budget * num_kv_heads - before).clamp(min=0))
        adaptive = torch.zeros_like(ordered).scatter_(-1, order, taken).view_as(sizes).sum(-1)
        return self._with_floor(adaptive.double()).long()
