"""The best units exactly, the next ones as an estimate, the others not at all."""

from typing import ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages import Selector
from kvframe.types import Invariant, Selection, StepInputs, UnitTable
from kvframe.validators import integer, share


@frozen(kw_only=True)
class EstimationZone(Selector):
    """Units in score order: exact up to a budget of tokens, then a share of all units estimated, as in RetroInfer
    (2025, arXiv 2505.02922).

    An estimated unit enters attention as one virtual entry, its size times exp(q . mean key), with its mean value. The
    estimates begin with the unit at which the budget ends, as far as its tokens are not taken. A unit that leaves the
    window is estimated until the next selection. Needs a scorer that keeps mean keys and values.
    """

    name: ClassVar[str] = "estimation-zone"
    capturable: ClassVar[bool] = True
    estimates: ClassVar[bool] = True
    waives: ClassVar[frozenset[Invariant]] = frozenset({Invariant.ATTENDED_ONLY})
    token_budget: int = field(default=1024, validator=integer(at_least=1))
    """Tokens that every head retrieves, where there are as many."""
    estimated_share: float = field(default=0.232, validator=share)
    """Of all units, those that are estimated, rounded."""

    @property
    def capacity(self) -> int:
        return self.token_budget

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> Selection:
        from kvframe_kernels.select_units import select_units

        rows, count = select_units(scores, units.offsets, self.token_budget, due=inputs.due)
        # In rank order: tokens up to and including each unit.
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        rank = order.argsort(dim=-1)
        exists = torch.arange(units.max_units, device=scores.device) < units.num_units[..., None]
        sizes = torch.where(exists, units.sizes, 0).gather(-1, order)
        num_exact = (sizes.cumsum(-1) <= self.token_budget).sum(-1, keepdim=True)
        num_estimated = (units.num_units.double() * self.estimated_share).round().long()[..., None]
        estimated = (rank >= num_exact) & (rank < num_exact + num_estimated) & exists
        return Selection(rows, count, estimated)
