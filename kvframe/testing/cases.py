"""What a run of a layer goes through, and what comes out of it: texts, turns, calls, traces."""

import functools
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from kvframe.composition import Policy
from kvframe.dense_layer import DenseLayer
from kvframe.layer import LayerRuntime
from kvframe.memory.token_ids import TokenIds
from kvframe.runtime import RetrievalLayer
from kvframe.types import Board, Execution, LayerLayout, UnitTable

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


class LayerBehind(RetrievalLayer):
    """A layer behind the dense ones that its scorer goes by; all of them see the same text."""

    def __init__(
        self, layout: LayerLayout, policy: Policy, capacity: int, execution: Execution, *, token_ids: TokenIds | None
    ) -> None:
        board: Board = {}
        super().__init__(layout, policy, capacity, execution, board=board, token_ids=token_ids)
        publish = functools.partial(policy.scorer.publish, board=board)
        self.before = [
            DenseLayer(evolve(layout, layer_idx=source), capacity, publish) for source in policy.scorer.sources
        ]

    def prompt(self, query: Tensor, keys: Tensor, values: Tensor, *arguments: Any, **options: Any) -> Tensor:
        for layer in self.before:
            layer.prompt(query, keys, values, *arguments, **options)
        return super().prompt(query, keys, values, *arguments, **options)

    def decode(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        for layer in self.before:
            layer.decode(query, keys, values)
        return super().decode(query, keys, values)

    def crop(self, num_tokens: int) -> None:
        for layer in self.before:
            layer.crop(num_tokens)
        super().crop(num_tokens)

    def reset(self) -> None:
        for layer in self.before:
            layer.reset()
        super().reset()


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

    def token_ids(self) -> TokenIds:
        """Ids of all tokens, and of some that a test may add; the same at the same position of every row, so that a row
        alone has those that it has in the batch."""
        generator, num_ids = torch.Generator().manual_seed(self.seed), self.num_tokens + 64
        ids = torch.randint(0, 8, (1, num_ids), generator=generator).expand(self.batch_size, -1)
        tokens = TokenIds(self.batch_size, ids.device)
        tokens.enter(ids, [0] * self.batch_size, [num_ids] * self.batch_size)
        return tokens

    def layer(self, policy: Policy, execution: Execution, **changes: Any) -> RetrievalLayer:
        """A fresh layer under a policy; where its scorer goes by other layers, behind those."""
        capacity = self.num_tokens if self.capacity is None else self.capacity
        layout = self.layout(**changes)
        ids = self.token_ids() if policy.needs_token_ids else None
        sources = policy.scorer.sources
        if not sources:
            return RetrievalLayer(layout, policy, capacity, execution, token_ids=ids)
        layout = evolve(layout, layer_idx=sources[-1] + 1, num_layers=sources[-1] + 2)
        return LayerBehind(layout, policy, capacity, execution, token_ids=ids)

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


def attended(layer: LayerRuntime) -> Heads:
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
