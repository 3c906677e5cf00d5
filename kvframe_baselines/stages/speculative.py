"""Select with the query of the step before, and at once where a head's query has turned away from it."""

from typing import ClassVar

import torch
from attrs import define, field, frozen
from torch import Tensor

from kvframe.stages import Trigger
from kvframe.types import Decision, LayerLayout, StepInputs
from kvframe.validators import finite_number


@define(eq=False)
class SpeculativeState:
    """Running state of one layer."""

    previous: Tensor  # [B, Hq, D], the query of the step before
    first: Tensor  # bool [B, H], no step since the prompt
    always: Tensor  # bool [B, H], all true


@frozen(kw_only=True)
class SpeculativeTrigger(Trigger):
    """Every step selects for the next one; a KV head whose query has turned selects at once.

    A head has turned where the mean of cos(q_{t-1}, q_t) over its group is below tau, and at the first step after the
    prompt or a turn's text. The others attend to what the step before selected with its own query, so that selecting
    and recalling need not be waited for. FreeKV (2025, arXiv 2505.13109). tau = -1 corrects at the first step only,
    tau > 1 is `every-step`.
    """

    name: ClassVar[str] = "speculative"
    capturable: ClassVar[bool] = True
    tau: float = field(default=0.8, validator=finite_number)
    """Similarity below which a head selects at once."""

    @property
    def selects_ahead(self) -> bool:
        return True

    def init(self, layout: LayerLayout) -> SpeculativeState:
        always = torch.ones(layout.batch_size, layout.num_kv_heads, dtype=torch.bool, device=layout.device)
        shape = (layout.batch_size, layout.num_qo_heads, layout.head_dim)
        previous = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        return SpeculativeState(previous=previous, first=always.clone(), always=always)

    def begin(self, query: Tensor, state: SpeculativeState) -> None:
        state.previous.copy_(query)
        state.first.fill_(True)

    def step(self, inputs: StepInputs, state: SpeculativeState) -> Decision:
        from kvframe_kernels.query_similarity import query_turned

        due = query_turned(
            inputs.query,
            state.previous,
            state.first,
            self.tau,
            num_kv_heads=inputs.layout.num_kv_heads,
            per_kv_head=True,
        )
        return Decision(due=due, ahead=state.always)
