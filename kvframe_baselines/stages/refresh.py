"""Attend to everything again where the query has left that of the last full step."""

from typing import ClassVar

import torch
from attrs import define, field, frozen
from torch import Tensor

from kvframe.stages import Trigger
from kvframe.types import Decision, LayerLayout, StepInputs
from kvframe.validators import finite_number, integer


@define(eq=False)
class RefreshState:
    """Running state of one layer."""

    reference: Tensor  # [B, Hq, D], the query of the last step that attended in full
    steps: Tensor  # int64 [B, H], steps since the prompt


@frozen(kw_only=True)
class RefreshTrigger(Trigger):
    """Every `stride` steps, a step whose query has left that of the last full step attends to everything.

    It has left it where the mean of cos over all query heads of the layer is at most tau; each layer decides on its
    own. What the following steps attend to is selected after the full step, from its attention. The last token of a
    prompt counts as a full step, and so the first step selects and does not attend in full. RefreshKV (2024, arXiv
    2411.05787).
    """

    name: ClassVar[str] = "refresh"
    attends_in_full: ClassVar[bool] = True
    stride: int = field(default=5, validator=integer(at_least=1))
    """Steps from one comparison to the next."""
    tau: float = field(default=0.85, validator=finite_number)
    """Similarity at or below which a step attends to everything."""

    @property
    def selects_ahead(self) -> bool:
        return True

    def init(self, layout: LayerLayout) -> RefreshState:
        shape = (layout.batch_size, layout.num_qo_heads, layout.head_dim)
        heads = (layout.batch_size, layout.num_kv_heads)
        return RefreshState(
            reference=torch.zeros(shape, dtype=layout.dtype, device=layout.device),
            steps=torch.zeros(heads, dtype=torch.int64, device=layout.device),
        )

    def begin(self, query: Tensor, state: RefreshState) -> None:
        state.reference.copy_(query)
        state.steps.zero_()

    def step(self, inputs: StepInputs, state: RefreshState) -> Decision:
        from kvframe_kernels.query_similarity import query_similarity

        similarity = query_similarity(inputs.query, state.reference, inputs.layout.num_kv_heads, False)
        first = state.steps == 0
        state.steps.add_(1)
        full = (similarity <= self.tau) & (state.steps % self.stride == 0)
        own = full.repeat_interleave(inputs.layout.group_size, 1)[..., None]
        state.reference.copy_(torch.where(own, inputs.query, state.reference))
        return Decision(due=first, ahead=full, full=full)
