"""The semantic trigger: select anew where the query has turned away from that of the step before."""

from typing import Any, ClassVar, Literal

import torch
from attrs import define, field, frozen
from torch import Tensor

from kvframe.errors import ConfigError
from kvframe.stages import Trigger
from kvframe.types import Decision, LayerLayout, StepInputs
from kvframe.validators import finite_number, one_of
from kvframe_kernels.query_similarity import query_turned


@define(eq=False)
class SemanticState:
    """Running state of one layer."""

    tau: float
    previous: Tensor  # [B, Hq, D], the query of the step before
    first: Tensor  # bool [B, H], no step since the prompt


def _to_tau(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@frozen(kw_only=True)
class SemanticTrigger(Trigger):
    """LouisKV's trigger: r_t = mean over query heads of cos(q_{t-1}, q_t), due where r_t < tau.

    The first step after the prompt, or after a turn's text, is always due. tau = -1 leaves only that step, tau > 1
    takes every step. LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences, 2025, arXiv 2510.11292. The
    paper sets one tau per model; `kvframe calibrate` finds one per model or per layer from unlabelled text.
    """

    name: ClassVar[str] = "semantic"
    capturable: ClassVar[bool] = True
    calibrated: ClassVar[tuple[str, ...]] = ("tau",)
    tau: float | tuple[float, ...] = field(default=0.7, converter=_to_tau)
    """Threshold; a tuple has one for every layer of the model."""
    rope: Literal["after", "before"] = field(default="after", validator=one_of("after", "before"))
    """Compare queries after the rotary embedding, as attention sees them, or before it."""
    heads: Literal["layer", "kv-head"] = field(default="layer", validator=one_of("layer", "kv-head"))
    """One decision a layer and sequence, as in the paper, or one for every KV head from its own query heads."""

    @tau.validator
    def _check_tau(self, attribute: Any, value: object) -> None:
        for tau in value if isinstance(value, tuple) else (value,):
            finite_number(self, attribute, tau)
        if value == ():
            raise ConfigError("SemanticTrigger.tau must be a number or one number for every layer, got an empty tuple")

    def init(self, layout: LayerLayout) -> SemanticState:
        """Raises ConfigError where tau does not fit the model, or the queries before RoPE cannot be had."""
        if isinstance(self.tau, tuple) and len(self.tau) != layout.num_layers:
            raise ConfigError(
                f"SemanticTrigger.tau has {len(self.tau)} values, the model has {layout.num_layers} layers; "
                "calibrate it for this model, or give one number"
            )
        if self.rope == "before" and layout.rotate is None:
            raise ConfigError(
                "SemanticTrigger(rope='before') needs a model whose rotary embedding kvframe can undo, and this one's "
                "it cannot; use rope='after'"
            )
        shape = (layout.batch_size, layout.num_qo_heads, layout.head_dim)
        return SemanticState(
            tau=self.tau[layout.layer_idx] if isinstance(self.tau, tuple) else self.tau,
            previous=torch.zeros(shape, dtype=layout.dtype, device=layout.device),
            first=torch.ones(layout.batch_size, layout.num_kv_heads, dtype=torch.bool, device=layout.device),
        )

    def begin(self, query: Tensor, state: SemanticState) -> None:
        state.previous.copy_(query)
        state.first.fill_(True)

    def step(self, inputs: StepInputs, state: SemanticState) -> Decision:
        layout, turned = inputs.layout, None
        if self.rope == "before" and layout.rotate is not None:
            # Turning the older query by one position leaves the angle that the two had before RoPE.
            turned = layout.rotate(state.previous, 1)
        due = query_turned(
            inputs.query,
            state.previous,
            state.first,
            state.tau,
            num_kv_heads=layout.num_kv_heads,
            per_kv_head=self.heads == "kv-head",
            turned=turned,
        )
        return Decision(due=due)
