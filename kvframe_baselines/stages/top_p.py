"""As many tokens as the query needs: the fewest that hold a share of the attention."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages import SelectorAround
from kvframe.stages.selector import only_due
from kvframe.types import Invariant, LeavingUnits, Selection, StepInputs, UnitTable
from kvframe.validators import one_of, share

_OWN = "top-p "  # the other selector may keep something of the same name


@frozen(kw_only=True)
class TopP(SelectorAround):
    """Of another selector's rows the fewest that hold the share `p` of the attention: Twilight (2025, arXiv
    2502.02770).

    Weights come from keys in a few bits, kept on the device: softmax over the candidates for every query head, then the
    mean over the heads of a group. A head takes candidates in the order of their weights until they add up to at least
    p, and one at least.
    """

    name: ClassVar[str] = "top-p"
    capturable: ClassVar[bool] = True
    waives: ClassVar[frozenset[Invariant]] = frozenset({Invariant.EXACT_BUDGET})
    p: float = field(default=0.85, validator=share)
    """Share of the candidates' attention that is taken."""
    bits: Literal[2, 4, 8] = field(default=4, validator=one_of(2, 4, 8))
    """Of a number in the copy of the keys that candidates are weighed by."""

    def row_index(
        self, keys: Tensor, values: Tensor, centres: Tensor, channels: Tensor | None = None
    ) -> dict[str, Tensor]:
        from kvframe_kernels.key_sketch import encode_sketch

        own = encode_sketch(keys, self.bits).named(_OWN)
        return {**super().row_index(keys, values, centres, channels), **own}

    def extend(self, row_index: Mapping[str, Tensor], unit: LeavingUnits, channels: Tensor | None = None) -> None:
        from kvframe_kernels.key_sketch import Sketch, window_sketch

        super().extend(row_index, unit, channels)
        window_sketch(
            Sketch.of(row_index, _OWN), self.bits, unit.leaves, unit.start, unit.size, unit.keys,
            unit.ring_first, unit.ring_size, centred=False,
        )  # fmt: skip

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> Selection:
        from kvframe_kernels.key_sketch import Sketch, sketch_scores

        made = Selection.of(super().select(inputs, scores, units))
        rows, count = only_due(made.rows, made.count, inputs.due)
        places = torch.arange(rows.shape[-1], device=rows.device)
        sketch = Sketch.of(units.row_index, _OWN)
        weights = sketch_scores(inputs.query, rows, count, sketch, self.bits, inputs.layout.sm_scale, due=inputs.due)
        # Equal weights go to the lower row, whatever the order in which candidates come.
        order = torch.where(rows < 0, torch.iinfo(torch.int64).max, rows).argsort(dim=-1, stable=True)
        order = order.gather(-1, weights.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
        ranked = weights.gather(-1, order).clamp(min=0)
        # A candidate is needed while those before it do not reach p.
        needed = ((ranked.cumsum(-1) - ranked < self.p) & (ranked > 0)).sum(-1)
        taken = torch.minimum(needed.clamp(min=1), count)
        return Selection(rows.gather(-1, order).masked_fill(places >= taken[..., None], -1), taken, made.estimated)
