"""A trigger: selections come less often while the query stays where it is."""

from typing import ClassVar

import torch
from attrs import define, field, frozen
from torch import Tensor

import kvframe
from kvframe.validators import finite_number, integer


@define(eq=False)
class StrideState:
    """Running state of one layer."""

    selected: Tensor  # [B, Hq, D], the query of the last selection
    stride: Tensor  # int64 [B, H], steps from the last selection to the next
    age: Tensor  # int64 [B, H], steps since the last selection


@frozen(kw_only=True)
class AdaptiveStride(kvframe.Trigger):
    """Select after a stride that doubles while the query keeps its direction, and starts again when it does not.

    At each selection the query is compared with that of the last one, by their cosine, meaned over the query heads of
    a KV head. Where it is at least `tau`, the next stride is twice as long, up to `max_stride`; elsewhere it is 1.
    """

    name: ClassVar[str] = "adaptive-stride"
    capturable: ClassVar[bool] = True
    tau: float = field(default=0.8, validator=finite_number)
    """Cosine from which on the query counts as where it was."""
    max_stride: int = field(default=16, validator=integer(at_least=1))
    """The most steps without a selection."""

    def init(self, layout: kvframe.LayerLayout) -> StrideState:
        heads = (layout.batch_size, layout.num_kv_heads)
        query = (layout.batch_size, layout.num_qo_heads, layout.head_dim)
        return StrideState(
            selected=torch.zeros(query, dtype=layout.dtype, device=layout.device),
            stride=torch.ones(heads, dtype=torch.int64, device=layout.device),
            age=torch.ones(heads, dtype=torch.int64, device=layout.device),
        )

    def begin(self, query: Tensor, state: StrideState) -> None:
        state.selected.zero_()  # similar to nothing, so the first stride is 1
        state.stride.fill_(1)
        state.age.fill_(1)

    def step(self, inputs: kvframe.StepInputs, state: StrideState) -> kvframe.Decision:
        due = state.age >= state.stride
        cosine = torch.cosine_similarity(inputs.query, state.selected, dim=-1)  # [B, Hq]
        stays = cosine.view(*due.shape, -1).mean(-1) >= self.tau  # [B, H]
        longer = torch.where(stays, 2 * state.stride, 1).clamp(max=self.max_stride)
        state.stride.copy_(torch.where(due, longer, state.stride))
        state.age.masked_fill_(due, 0).add_(1)
        heads = due.repeat_interleave(inputs.layout.group_size, 1, output_size=inputs.query.shape[1])
        state.selected.copy_(torch.where(heads[..., None], inputs.query, state.selected))
        return kvframe.Decision(due=due)
