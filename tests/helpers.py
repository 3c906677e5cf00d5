"""What the tests of stages, memory and policies share: small stages and policies, texts, and runs over them.

Stages and policies come from the registry, so that whatever is registered joins the tests that loop over it.
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor

import kvframe
from kvframe import Decision, LayerLayout, Policy, Selector, StepInputs, Trigger, UnitBuilder, Units, UnitTable
from kvframe.options import option_names
from kvframe.registry import PolicyRecord, default_registry
from kvframe.runtime import RetrievalLayer
from kvframe.stages import PageUnits, Stage, TokenUnits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# ---- small stages and policies ------------------------------------------------------------------------------------

# Values that make a short text go through everything a stage does, by the name of the option.
SMALL_OPTIONS: dict[str, Any] = {
    "block_size": 11,
    "cluster_size": 3,
    "max_segment": 5,
    "min_segment": 2,
    "num_iterations": 2,
    "output": TokenUnits(),
    "page_size": 3,
    "prompt": PageUnits(page_size=3),
    "sink_size": 2,
    "stride": 3,
    "tau": 0.7,
    "token_budget": 10,
    "window_size": 4,
}


def small_options(config_cls: type[Any]) -> dict[str, Any]:
    """The small values of those options that a stage or a policy's config has."""
    return {name: SMALL_OPTIONS[name] for name in option_names(config_cls) if name in SMALL_OPTIONS}


def small_stages(slot: str) -> list[Stage]:
    """Every registered stage of a slot, small."""
    return [record.make(**small_options(record.stage)) for record in default_registry().stages(slot)]


def small_policy(record: PolicyRecord) -> Policy:
    """A registered policy, small; no layer is dense unless all are."""
    policy = record.make(**small_options(record.config_cls))
    return policy if policy.dense_layers == "all" else policy.swap(dense_layers=())


def stage_id(stage: Stage) -> str:
    """What a test of a stage is called."""
    return stage.name


def policy_records() -> list[PolicyRecord]:
    """Every registered policy."""
    return list(default_registry().policies())


def record_id(record: PolicyRecord) -> str:
    """What a test of a policy is called."""
    return record.name


# ---- texts --------------------------------------------------------------------------------------------------------


def turn(query: Tensor, num_positions: int) -> Tensor:
    """Turn the first two channels by half a radian a position: a rotary embedding of one frequency."""
    angle = torch.tensor(0.5 * num_positions, dtype=query.dtype)
    first, second, rest = query[..., :1], query[..., 1:2], query[..., 2:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


def make_layout(
    *,
    batch_size: int = 2,
    num_kv_heads: int = 2,
    group_size: int = 2,
    head_dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> LayerLayout:
    """A layer on the CPU, in float64 unless said otherwise."""
    layout = LayerLayout(
        layer_idx=0,
        num_layers=1,
        batch_size=batch_size,
        num_qo_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
        dtype=dtype,
        device=torch.device("cpu"),
        sm_scale=head_dim**-0.5,
        rotate=turn,
    )
    return evolve(layout, **changes)


def unit_table(sizes: Tensor, num_units: Tensor) -> UnitTable:
    """Units of these sizes [B, H, U], from row 0 on."""
    offsets = torch.cat([torch.zeros_like(sizes[..., :1]), sizes.cumsum(-1)], -1)
    return UnitTable(offsets=offsets, num_units=num_units, max_units=sizes.shape[-1])


@frozen(kw_only=True, eq=False)
class Text:
    """Queries, keys and values of a batch; padding, where a row has some, is NaN."""

    query: Tensor  # [B, Hq, T, D]
    keys: Tensor  # [B, H, T, D]
    values: Tensor  # [B, H, T, Dv]

    def span(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens [start, stop), padding included."""
        return self.query[:, :, start:stop], self.keys[:, :, start:stop], self.values[:, :, start:stop]

    def row(self, batch: int, padding: int) -> "Text":
        """One sequence alone, without its padding."""
        own = slice(batch, batch + 1)
        return Text(
            query=self.query[own, :, padding:], keys=self.keys[own, :, padding:], values=self.values[own, :, padding:]
        )


def make_text(layout: LayerLayout, num_tokens: int, seed: int, padding: tuple[int, ...] = ()) -> Text:
    """Random keys and values; queries that stay about the same for a few tokens and then change."""
    generator = torch.Generator().manual_seed(seed)

    def randn(num_heads: int, width: int) -> Tensor:
        return torch.randn(layout.batch_size, num_heads, num_tokens, width, generator=generator, dtype=torch.float64)

    topic = (torch.rand(layout.batch_size, num_tokens, generator=generator) < 0.25).cumsum(1)
    topic = topic[:, None, :, None].expand(-1, layout.num_qo_heads, -1, layout.head_dim)
    query = 2 * randn(layout.num_qo_heads, layout.head_dim).gather(2, topic.clamp(max=num_tokens - 1))
    query = query + 0.4 * randn(layout.num_qo_heads, layout.head_dim)
    keys, values = randn(layout.num_kv_heads, layout.head_dim), randn(layout.num_kv_heads, layout.value_dim)
    for batch, num in enumerate(padding):
        for states in (query, keys, values):
            states[batch, :, :num] = torch.nan
    return Text(query=query.to(layout.dtype), keys=keys.to(layout.dtype), values=values.to(layout.dtype))


# ---- runs ---------------------------------------------------------------------------------------------------------


@frozen(kw_only=True)
class Turn:
    """A prompt or a turn's text in chunks, and the steps generated after it."""

    chunks: tuple[int, ...]
    num_steps: int


@frozen(kw_only=True)
class Call:
    """One call of a layer: columns of the text, padding included."""

    start: int
    stop: int
    is_prompt: bool


@frozen(kw_only=True)
class Case:
    """What a run goes through: the shape of a layer, the padding of its rows, and turns."""

    batch_size: int = 2
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 8
    value_dim: int | None = None
    padding: tuple[int, ...] = (0, 3)
    turns: tuple[Turn, ...] = (Turn(chunks=(37,), num_steps=12),)
    capacity: int | None = None
    """Rows planned for; None for as many as there are tokens."""
    seed: int = 0

    def layout(self, **changes: Any) -> LayerLayout:
        """The layer's shape."""
        return make_layout(
            batch_size=self.batch_size,
            num_kv_heads=self.num_kv_heads,
            group_size=self.group_size,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            **changes,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of a row, padding included."""
        return sum(sum(part.chunks) + part.num_steps for part in self.turns)

    def text(self, layout: LayerLayout, seed: int | None = None) -> Text:
        """The text of all turns."""
        return make_text(layout, self.num_tokens, self.seed if seed is None else seed, self.padding)

    def layer(self, policy: Policy, execution: str, **changes: Any) -> RetrievalLayer:
        """A fresh layer under a policy."""
        capacity = self.num_tokens if self.capacity is None else self.capacity
        return RetrievalLayer(self.layout(**changes), policy, capacity, execution)

    def calls(self) -> Iterator[Call]:
        """The calls of all turns."""
        column = 0
        for part in self.turns:
            sizes = [(size, True) for size in part.chunks] + [(1, False)] * part.num_steps
            for size, is_prompt in sizes:
                yield Call(start=column, stop=column + size, is_prompt=is_prompt)
                column += size

    def num_real(self, call: Call) -> list[int]:
        """The tokens of a call that are not padding."""
        return [min(call.stop - call.start, max(0, call.stop - num)) for num in self.padding]

    def alone(self, batch: int) -> "Case":
        """One row of this case without its padding; its prompt is cut where the batch's was."""
        calls = [call for call in self.calls() if call.stop <= sum(self.turns[0].chunks)]
        chunks = tuple(num for num in (self.num_real(call)[batch] for call in calls) if num)
        first = Turn(chunks=chunks, num_steps=self.turns[0].num_steps)
        return evolve(self, batch_size=1, padding=(0,), turns=(first, *self.turns[1:]))


def make_call(layer: RetrievalLayer, text: Text, case: Case, call: Call) -> Tensor:
    """One call of a case; gives the layer's output."""
    states = text.span(call.start, call.stop)
    if call.is_prompt:
        return layer.prompt(*states, case.num_real(call), call.stop - call.start)
    return layer.decode(*states)


Heads = list[list[list[int]]]
"""Positions of every row and KV head."""


@frozen(kw_only=True, eq=False)
class Trace:
    """What came out of a run."""

    prompts: list[Tensor] = field(factory=list)
    """Outputs of prompt calls."""
    outputs: list[Tensor] = field(factory=list)
    """Outputs of decode steps."""
    attended: list[Heads] = field(factory=list)
    """Positions attended to by decode steps."""


def play(layer: RetrievalLayer, text: Text, case: Case) -> Trace:
    """All calls of a case, one after the other."""
    trace = Trace()
    for call in case.calls():
        out = make_call(layer, text, case, call)
        if call.is_prompt:
            trace.prompts.append(out)
        else:
            trace.outputs.append(out)
            trace.attended.append(attended(layer))
    return trace


def attended(layer: RetrievalLayer) -> Heads:
    """Positions that the last step attended to."""
    layout = layer.layout
    return [
        [layer.attended_positions(batch, head).tolist() for head in range(layout.num_kv_heads)]
        for batch in range(layout.batch_size)
    ]


def assert_equal_traces(expected: Trace, actual: Trace, tolerance: float) -> None:
    """The same positions at every step, and the same outputs but for rounding."""
    assert expected.attended == actual.attended
    assert_close(expected.prompts, actual.prompts, tolerance)
    assert_close(expected.outputs, actual.outputs, tolerance)


def assert_close(expected: list[Tensor], actual: list[Tensor], tolerance: float) -> None:
    """Tensors one by one, absolute and relative."""
    assert len(expected) == len(actual)
    for one, other in zip(expected, actual):
        torch.testing.assert_close(other, one, atol=tolerance, rtol=tolerance)


def unit_positions(layer: RetrievalLayer, batch: int, head: int, num_units: int) -> list[list[int]]:
    """The first units of a head's ledger, by the positions of their tokens."""
    offsets = layer.ledger.unit_offsets[batch, head, : num_units + 1].tolist()
    positions = layer.positions.of(batch, layer.capacity)[head].tolist()
    return [positions[start:stop] for start, stop in pairwise(offsets)]


def unit_lists(units: Units, head: int) -> list[list[int]]:
    """One head's units of a run of tokens, by their places in it."""
    sizes = units.sizes[head, : int(units.num_units[head])].tolist()
    return [part.tolist() for part in units.order[head].split(sizes)]


# ---- what the definition says ---------------------------------------------------------------------------------------


def dot(one: list[float], other: list[float]) -> float:
    """Scalar product."""
    return sum(x * y for x, y in zip(one, other, strict=True))


def cosine(one: list[float], other: list[float]) -> float:
    """Of two vectors that are not zero."""
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, sm_scale: float) -> Tensor:
    """Softmax attention in float64: query [..., D], keys [..., n, D], values [..., n, Dv], visible bool [..., n]."""
    # What is not visible may be NaN, as padding is.
    keys, values = (part.double().masked_fill(~visible[..., None], 0) for part in (keys, values))
    products = (keys @ query.double()[..., None])[..., 0] * sm_scale
    weights = products.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights[..., None, :] @ values)[..., 0, :]


def attention_over(text: Text, case: Case, layout: LayerLayout, column: int, positions: Heads) -> Tensor:
    """Output [B, Hq, 1, Dv] of the query in a column, every KV head attending to its own positions."""
    visible = torch.zeros(text.keys.shape[:3], dtype=torch.bool)
    for batch, rows in enumerate(positions):
        for head, own in enumerate(rows):
            visible[batch, head, torch.tensor(own) + case.padding[batch]] = True
    return attention_where(text, layout, column, visible)


def attention_where(text: Text, layout: LayerLayout, column: int, visible: Tensor) -> Tensor:
    """The same over the columns of a mask [B, H, T]."""
    keys, values, visible = (
        part.repeat_interleave(layout.group_size, dim=1) for part in (text.keys, text.values, visible)
    )
    return plain_attention(text.query[:, :, column], keys, values, visible, layout.sm_scale)[:, :, None]


def causal_attention_over(text: Text, case: Case, layout: LayerLayout) -> Tensor:
    """Output [B, Hq, T, Dv] of full attention, causal, zero at padding."""
    columns = torch.arange(text.keys.shape[2])
    real = columns >= torch.tensor(case.padding)[:, None, None]
    outputs = []
    for column in columns.tolist():
        visible = (real & (columns <= column)).expand(text.keys.shape[:3])
        # A query at padding sees nothing, which is 0/0.
        outputs.append(attention_where(text, layout, column, visible).nan_to_num(0.0))
    return torch.cat(outputs, 2)


# ---- decisions on tape ----------------------------------------------------------------------------------------------


class Tape:
    """Records what stages decide, in the order in which the runtime asks, and answers with it when played back."""

    def __init__(self) -> None:
        self.decisions: deque[Any] = deque()
        self.playing = False

    def __call__(self, decide: Callable[[], Any]) -> Any:
        """The recorded decision, or the one that is made now."""
        if self.playing:
            return self.decisions.popleft()
        decision = decide()
        self.decisions.append(decision)
        return decision

    def wrap(self, policy: Policy) -> Policy:
        """The policy with its deciding stages on this tape."""
        return policy.swap(
            trigger=TapedTrigger(stage=policy.trigger, tape=self),
            units=TapedUnits(stage=policy.units, tape=self),
            selector=TapedSelector(stage=policy.selector, tape=self),
        )


@frozen(kw_only=True)
class TapedTrigger(Trigger):
    name = "taped"
    stage: Trigger
    tape: Tape

    def init(self, layout: LayerLayout) -> Any:
        return self.stage.init(layout)

    def begin(self, query: Tensor, state: Any) -> None:
        self.stage.begin(query, state)

    def step(self, inputs: StepInputs, state: Any) -> Decision:
        return self.tape(lambda: Decision(due=self.stage.step(inputs, state).due.clone()))


@frozen(kw_only=True)
class TapedUnits(UnitBuilder):
    name = "taped"
    stage: UnitBuilder
    tape: Tape

    @property
    def unit_size(self) -> int:
        return self.stage.unit_size

    @property
    def min_size(self) -> int:
        return self.stage.min_size

    @property
    def max_size(self) -> int:
        return self.stage.max_size

    def build(self, keys: Tensor) -> Units:
        return self.tape(lambda: self.stage.build(keys))

    def init(self, layout: LayerLayout) -> Any:
        return self.stage.init(layout)

    def boundary(self, inputs: StepInputs, decision: Decision, state: Any) -> Tensor | None:
        return self.tape(lambda: self.stage.boundary(inputs, decision, state))


@frozen(kw_only=True)
class TapedSelector(Selector):
    name = "taped"
    stage: Selector
    tape: Tape

    @property
    def capacity(self) -> int:
        return self.stage.capacity

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> tuple[Tensor, Tensor]:
        return self.tape(lambda: self.stage.select(inputs, scores, units))


@frozen(kw_only=True)
class ScatteredTrigger(Trigger):
    """Due at steps that differ from head to head, the first one not always among them."""

    name = "scattered"
    seed: int

    def init(self, layout: LayerLayout) -> Tensor:
        return torch.zeros(layout.batch_size, layout.num_kv_heads, dtype=torch.int64)

    def begin(self, query: Tensor, state: Tensor) -> None:
        state.zero_()

    def step(self, inputs: StepInputs, state: Tensor) -> Decision:
        heads = torch.arange(inputs.layout.num_kv_heads)
        due = (state * 31 + heads * 17 + self.seed) * 7919 % 101 < 40
        state.add_(1)
        return Decision(due=due)


# ---- models ---------------------------------------------------------------------------------------------------------


@functools.cache
def tiny_llama(
    *,
    num_layers: int = 2,
    num_kv_heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
) -> "PreTrainedModel":
    """A random Llama with four query heads; its weights are large enough for attention to be far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=8192,
        initializer_range=0.4,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@frozen(kw_only=True, eq=False)
class ModelInputs:
    """Token ids of all turns, with the mask and positions that left padding asks for."""

    ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    positions: Tensor  # [B, T]

    def span(self, start: int, stop: int) -> dict[str, Tensor]:
        """Arguments of a forward pass over the columns [start, stop)."""
        return {
            "input_ids": self.ids[:, start:stop],
            "attention_mask": self.mask[:, :stop],
            "position_ids": self.positions[:, start:stop],
        }

    def row(self, batch: int, padding: int) -> "ModelInputs":
        """One sequence alone, without its padding."""
        own = (slice(batch, batch + 1), slice(padding, None))
        return ModelInputs(ids=self.ids[own], mask=self.mask[own], positions=self.positions[own])


def model_inputs(case: Case) -> ModelInputs:
    """Random ids for a case."""
    generator = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(3, 64, (case.batch_size, case.num_tokens), generator=generator)
    mask = torch.arange(case.num_tokens) >= torch.tensor(case.padding)[:, None]
    return ModelInputs(ids=ids, mask=mask.long(), positions=(mask.cumsum(1) - 1).clamp(min=0))


@frozen(kw_only=True, eq=False)
class ModelTrace:
    """What came out of a model."""

    logits: list[Tensor] = field(factory=list)
    """Of every call, zero at padding."""
    attended: list[list[Heads]] = field(factory=list)
    """Positions attended to by every decode step in every layer."""


@torch.no_grad()
def play_model(
    model: "PreTrainedModel", policy: Policy, case: Case, execution: str, inputs: ModelInputs | None = None
) -> ModelTrace:
    """All calls of a case by an attached model; `case` gives the batch, not the model's heads."""
    inputs, trace = inputs or model_inputs(case), ModelTrace()
    with kvframe.attach(model, policy, execution=execution) as run:
        cache = run.new_cache(case.num_tokens)
        for call in case.calls():
            cache.prompt_end = call.stop if call.is_prompt else None
            logits = model(**inputs.span(call.start, call.stop), past_key_values=cache).logits
            trace.logits.append(logits * inputs.mask[:, call.start : call.stop, None])
            if not call.is_prompt:
                trace.attended.append([attended(layer.runtime) for layer in cache.managed_layers])
    return trace


@torch.no_grad()
def play_stock(model: "PreTrainedModel", case: Case) -> list[Tensor]:
    """Logits of all calls of a case by the model as it is, from one forward pass over everything."""
    inputs = model_inputs(case)
    logits = model(**inputs.span(0, case.num_tokens)).logits * inputs.mask[..., None]
    return [logits[:, call.start : call.stop] for call in case.calls()]
