"""The semantic trigger: select anew where the query has turned away from that of the step before."""

from typing import Any, ClassVar, Literal

import torch
from attrs import define, field, frozen
from torch import Tensor

from kvframe.errors import ConfigError
from kvframe.stages import Trigger
from kvframe.types import Decision, LayerLayout, StepInputs
from kvframe.validators import finite_number, integer, one_of
from kvframe_kernels.query_similarity import query_similarity, query_turned


@define(eq=False)
class SemanticState:
    """Running state of one layer. What an option needs is None without that option."""

    tau: float
    previous: Tensor  # [B, Hq, D], the query of the step before
    first: Tensor  # bool [B, H], no step since the prompt
    age: Tensor | None = None  # int64 [B, H], steps since the last selection; -1 while one is made for the next step
    threshold: float = 0.0  # of the anchor, for this layer
    anchor: Tensor | None = None  # [B, Hq, D], the query of the last selection, turned to the position of this step
    armed: Tensor | None = None  # bool [B, H], the similarity has been high since the trigger last fired


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@frozen(kw_only=True)
class SemanticTrigger(Trigger):
    """LouisKV's trigger: r_t = mean over query heads of cos(q_{t-1}, q_t), due where r_t < tau.

    The first step after the prompt, or after a turn's text, is always due. tau = -1 leaves only that step, tau > 1
    takes every step. LouisKV: Efficient KV Cache Retrieval for Long Input-Output Sequences, 2025, arXiv 2510.11292. The
    paper sets one tau per model; `kvframe calibrate` finds one per model or per layer from unlabelled text.

    The other options are ours and off as it comes: neighbouring queries say nothing about slow drift, which `max_age`
    and `anchor` guard against, and an outlier fires twice, which `hysteresis` prevents.
    """

    name: ClassVar[str] = "semantic"
    capturable: ClassVar[bool] = True
    calibrated: ClassVar[tuple[str, ...]] = ("tau", "anchor")
    tau: float | tuple[float, ...] = field(default=0.7, converter=_to_tuple)
    """Threshold; a tuple has one for every layer of the model."""
    rope: Literal["after", "before"] = field(default="after", validator=one_of("after", "before"))
    """Compare queries after the rotary embedding, as attention sees them, or before it."""
    heads: Literal["layer", "kv-head"] = field(default="layer", validator=one_of("layer", "kv-head"))
    """One decision a layer and sequence, as in the paper, or one for every KV head from its own query heads."""
    max_age: int | None = field(default=None, validator=integer(at_least=1, or_none=True))
    """A selection is due at the latest so many steps after the last one; None for no bound."""
    anchor: float | tuple[float, ...] | None = field(default=None, converter=_to_tuple)
    """Also due where the cosine to the query of the last selection, both before RoPE, is below this; a tuple has one
    value for every layer, None compares with the step before alone."""
    hysteresis: float | None = field(default=None)
    """Having fired, tau fires again only after a similarity of at least tau + hysteresis, as in a Schmitt trigger, so
    that an outlier, which turns away and back, fires once. Age and anchor fire regardless; None for no such thing."""
    ahead: bool = field(default=False, validator=one_of(True, False))
    """Select for the step after the one that fires, which attends to what is there: nothing waits for it. The first
    step after a prompt selects for itself all the same."""

    @property
    def selects_ahead(self) -> bool:
        return self.ahead

    @tau.validator
    @anchor.validator
    def _check_thresholds(self, attribute: Any, value: object) -> None:
        if attribute.name == "anchor" and value is None:
            return
        for threshold in value if isinstance(value, tuple) else (value,):
            finite_number(self, attribute, threshold)
        if value == ():
            raise ConfigError(
                f"SemanticTrigger.{attribute.name} must be a number or one number for every layer, got an empty tuple"
            )

    @hysteresis.validator
    def _check_hysteresis(self, attribute: Any, value: Any) -> None:
        if value is not None:
            finite_number(self, attribute, value)
            if value < 0:
                raise ConfigError(f"SemanticTrigger.hysteresis must be a number >= 0 or None, got {value!r}")

    def init(self, layout: LayerLayout) -> SemanticState:
        """Raises ConfigError where thresholds do not fit the model, or the queries before RoPE cannot be had."""
        if layout.rotate is None and (self.rope == "before" or self.anchor is not None):
            option, way_out = f"anchor={self.anchor}", "max_age instead of an anchor"
            if self.rope == "before":
                option, way_out = "rope='before'", "rope='after'"
            raise ConfigError(
                f"SemanticTrigger({option}) needs a model whose rotary embedding kvframe can undo, and this one's it "
                f"cannot; use {way_out}"
            )
        heads = (layout.batch_size, layout.num_kv_heads)
        shape = (layout.batch_size, layout.num_qo_heads, layout.head_dim)
        # Turned by one position at every step: in 16 bits the rounding of some hundred turns would add up.
        precise = torch.promote_types(layout.dtype, torch.float32)
        return SemanticState(
            tau=self._of_layer("tau", self.tau, layout),
            previous=torch.zeros(shape, dtype=layout.dtype, device=layout.device),
            first=torch.ones(heads, dtype=torch.bool, device=layout.device),
            age=None if self.max_age is None else torch.zeros(heads, dtype=torch.int64, device=layout.device),
            threshold=0.0 if self.anchor is None else self._of_layer("anchor", self.anchor, layout),
            anchor=None if self.anchor is None else torch.zeros(shape, dtype=precise, device=layout.device),
            armed=None if self.hysteresis is None else torch.ones(heads, dtype=torch.bool, device=layout.device),
        )

    @staticmethod
    def _of_layer(name: str, value: float | tuple[float, ...], layout: LayerLayout) -> float:
        if not isinstance(value, tuple):
            return value
        if len(value) != layout.num_layers:
            raise ConfigError(
                f"SemanticTrigger.{name} has {len(value)} values, the model has {layout.num_layers} layers; "
                "calibrate it for this model, or give one number"
            )
        return value[layout.layer_idx]

    def begin(self, query: Tensor, state: SemanticState) -> None:
        state.previous.copy_(query)
        state.first.fill_(True)
        if state.armed is not None:
            state.armed.fill_(True)

    def step(self, inputs: StepInputs, state: SemanticState) -> Decision:
        if state.age is None and state.anchor is None and not self.ahead:
            return Decision(due=self._turned(inputs, state))
        first = state.first.clone()
        turned = self._turned(inputs, state)
        drifted = self._drifted(inputs, state, first)
        if not self.ahead:
            due = turned | drifted
            self._remember(inputs, state, due, age=0)
            return Decision(due=due)
        ahead = (turned & ~first) | drifted
        # What is selected for the next step is in use from there on.
        self._remember(inputs, state, ahead, age=-1)
        return Decision(due=first, ahead=ahead, event=turned | drifted)

    def _turned(self, inputs: StepInputs, state: SemanticState) -> Tensor:
        """bool [B, H]: the query has turned away from the one before it, or is the first; remembers it."""
        layout, turned = inputs.layout, None
        if self.rope == "before" and layout.rotate is not None:
            # Turning the older query by one position leaves the angle that the two had before RoPE.
            turned = layout.rotate(state.previous, 1)
        per_kv_head = self.heads == "kv-head"
        if state.armed is None or self.hysteresis is None:
            return query_turned(
                inputs.query,
                state.previous,
                state.first,
                state.tau,
                num_kv_heads=layout.num_kv_heads,
                per_kv_head=per_kv_head,
                turned=turned,
            )
        older = state.previous if turned is None else turned
        similarity = query_similarity(inputs.query, older, layout.num_kv_heads, per_kv_head)
        low = similarity < state.tau
        due = (low & state.armed) | state.first
        state.armed.copy_((state.armed | (similarity >= state.tau + self.hysteresis)) & ~low)
        state.previous.copy_(inputs.query)
        state.first.fill_(False)
        return due

    def _drifted(self, inputs: StepInputs, state: SemanticState, first: Tensor) -> Tensor:
        """bool [B, H]: the last selection is too old, or was for quite another query; a first step is one itself."""
        layout, drifted = inputs.layout, torch.zeros_like(first)
        if state.age is not None and self.max_age is not None:
            state.age.add_(1).masked_fill_(first, 0)
            drifted |= state.age >= self.max_age - self.ahead
        if state.anchor is not None and layout.rotate is not None:
            state.anchor.copy_(layout.rotate(state.anchor, 1))
            self._set_anchor(inputs, state.anchor, first)
            query = inputs.query.to(state.anchor.dtype)
            similarity = query_similarity(query, state.anchor, layout.num_kv_heads, self.heads == "kv-head")
            drifted |= similarity < state.threshold
        return drifted

    def _remember(self, inputs: StepInputs, state: SemanticState, selects: Tensor, age: int) -> None:
        """Heads bool [B, H] select with this step's query; `age`: steps since that is in use."""
        if state.age is not None:
            state.age.masked_fill_(selects, age)
        if state.anchor is not None:
            self._set_anchor(inputs, state.anchor, selects)

    @staticmethod
    def _set_anchor(inputs: StepInputs, anchor: Tensor, heads: Tensor) -> None:
        chosen = heads.repeat_interleave(inputs.layout.group_size, 1)[..., None]
        anchor.copy_(torch.where(chosen, inputs.query.to(anchor.dtype), anchor))
