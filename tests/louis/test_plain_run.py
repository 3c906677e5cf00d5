"""LouisKV as a program over Python lists, step by step against the layer.

`dense` and `offload` share the ledger and the stages, so that what both get wrong shows only here.
"""

import math

import pytest
import torch
from attrs import define, field
from helpers import cosine, dot
from hypothesis import given

from kvframe import LayerLayout, Policy
from kvframe.registry import default_registry
from kvframe.testing.cases import Case, Text, attended, make_call, unit_positions
from kvframe.testing.reference import attention_over
from kvframe.testing.strategies import cases, examples, variants

LOUISKV = default_registry().policy_spec("louiskv")

Vector = list[float]


@define
class PlainHead:
    """One KV head: every token is in the sinks, in a unit that has left the window, in a closed unit that has not, in
    the open unit, or in the part of a prompt that is not yet cut."""

    policy: Policy
    keys: list[Vector]
    sinks: list[int] = field(factory=list)
    left: list[list[int]] = field(factory=list)
    closed: list[list[int]] = field(factory=list)
    open: list[int] = field(factory=list)
    uncut: list[int] = field(factory=list)
    resident: list[int] = field(factory=list)

    @property
    def length(self) -> int:
        units = self.left + self.closed
        return len(self.sinks) + sum(map(len, units)) + len(self.open) + len(self.uncut)

    @property
    def window(self) -> list[int]:
        return [position for unit in self.closed for position in unit] + self.open + self.uncut

    def leave(self, length: int) -> None:
        """Closed units before the last tokens enter the index, and the resident set while there is room."""
        while self.closed and self.closed[0][-1] < length - self.policy.window_size:
            unit = self.closed.pop(0)
            self.left.append(unit)
            self.resident += unit[: max(0, self.policy.selector.capacity - len(self.resident))]

    def read(self, num_tokens: int) -> None:
        """A chunk of a prompt, or of a turn's text: what does not fit the window becomes prompt units."""
        if self.open:
            self.closed.append(self.open)
            self.open = []
        length = self.length + num_tokens
        self.leave(length)
        for position in range(self.length, length):
            (self.sinks if position < self.policy.sink_size else self.uncut).append(position)
        block = [position for position in self.uncut if position < length - self.policy.window_size]
        if block:
            units = self.policy.units.build(torch.tensor([[self.keys[p] for p in block]], dtype=torch.float64))
            sizes = units.sizes[0, : int(units.num_units)].tolist()
            self.left += [[block[i] for i in part.tolist()] for part in units.order[0].split(sizes)]
            self.uncut = self.uncut[len(block) :]

    def step(self, event: bool) -> None:
        """One token; an event before it ends the open segment if that is long enough."""
        size = self.policy.units.max_size
        while len(self.uncut) >= size:
            self.closed.append(self.uncut[:size])
            self.uncut = self.uncut[size:]
        self.open, self.uncut = self.open + self.uncut, []
        if len(self.open) >= size or (event and len(self.open) >= self.policy.units.min_size):
            self.closed.append(self.open)
            self.open = []
        position = self.length
        (self.sinks if position < self.policy.sink_size else self.open).append(position)
        self.leave(self.length)

    def select(self, queries: list[Vector], sm_scale: float) -> None:
        """Whole units by the mean of their softmax over the query heads, until the budget is filled."""
        scores = [0.0] * len(self.left)
        for query in queries:
            products = [sm_scale * dot(query, self.mean_key(unit)) for unit in self.left]
            if self.policy.scorer.size_term:
                products = [x + math.log(len(unit)) for x, unit in zip(products, self.left)]
            total = sum(map(math.exp, products))
            scores = [score + math.exp(x) / total for score, x in zip(scores, products)]
        ranked = sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))
        rows = [position for unit in ranked for position in self.left[unit]]
        self.resident = rows[: self.policy.selector.capacity]

    def mean_key(self, unit: list[int]) -> Vector:
        """What stands for a unit."""
        return [math.fsum(column) / len(unit) for column in zip(*(self.keys[position] for position in unit))]

    def attended(self) -> list[int]:
        """In ascending order; a position twice would show."""
        return sorted(self.sinks + self.resident + self.window)


@define
class PlainTrigger:
    """What the trigger remembers of one KV head, as positions of the text."""

    used: int = 0
    """The first step that attends to what was selected last."""
    anchor: int = 0
    """The step whose query selected last."""
    armed: bool = True
    pending: int | None = None
    """The step whose query selects in the step to come."""


@define
class PlainRow:
    """One sequence under one trigger."""

    policy: Policy
    layout: LayerLayout
    text: Text  # of this row alone, without padding
    heads: list[PlainHead]
    triggers: list[PlainTrigger]
    first: bool = True
    length: int = 0

    def queries(self, position: int, head: int | None) -> list[Vector]:
        """Queries of a position: those of one KV head's group, or all."""
        group = self.layout.group_size
        own = slice(None) if head is None else slice(head * group, (head + 1) * group)
        return self.text.query[0, own, position].tolist()

    def similarity(self, before: int, head: int, rope: str) -> float:
        """Mean cosine of this step's queries to those of an earlier one."""
        which = head if self.policy.trigger.heads == "kv-head" else None
        now, older = self.queries(self.length, which), self.queries(before, which)
        if rope == "before":
            assert self.layout.rotate is not None
            older = self.layout.rotate(torch.tensor(older, dtype=torch.float64), self.length - before).tolist()
        return sum(map(cosine, now, older)) / len(now)

    def turned(self, head: int) -> bool:
        """r_t < tau, or the first step of a turn."""
        trigger, state = self.policy.trigger, self.triggers[head]
        similarity = self.similarity(self.length - 1, head, trigger.rope)
        low = similarity < trigger.tau
        fires = self.first or (low and state.armed)
        if trigger.hysteresis is not None:
            state.armed = not low and (state.armed or similarity >= trigger.tau + trigger.hysteresis)
        return fires

    def drifted(self, head: int) -> bool:
        """The selection in use is too old, or was for quite another query."""
        trigger, state = self.policy.trigger, self.triggers[head]
        if self.first:
            state.used = state.anchor = self.length
        in_use_from = self.length + trigger.ahead  # what would be selected now
        old = trigger.max_age is not None and in_use_from - state.used >= trigger.max_age
        return old or (trigger.anchor is not None and self.similarity(state.anchor, head, "before") < trigger.anchor)

    def read(self, num_tokens: int) -> None:
        """Prompt tokens."""
        for head in self.heads:
            head.read(num_tokens)
        for state in self.triggers:
            state.armed, state.pending = True, None
        self.length += num_tokens
        self.first = True

    def step(self) -> None:
        """One generated token."""
        ahead = self.policy.trigger.ahead
        for index, (head, state) in enumerate(zip(self.heads, self.triggers)):
            turned, drifted = self.turned(index), self.drifted(index)
            head.step(turned or drifted)
            now = self.first or ((turned or drifted) and not ahead)
            query = self.length if now else state.pending
            if query is not None:
                head.select(self.queries(query, index), self.layout.sm_scale)
            later = ahead and (drifted or (turned and not self.first))
            state.pending = self.length if later else None
            if now or later:
                state.used, state.anchor = self.length + later, self.length
        self.length += 1
        self.first = False


def plain_rows(policy: Policy, case: Case, layout: LayerLayout, text: Text) -> list[PlainRow]:
    """A program for every row."""
    rows = []
    for batch, padding in enumerate(case.padding):
        own = text.row(batch, padding)
        heads = [PlainHead(policy, own.keys[0, head].tolist()) for head in range(layout.num_kv_heads)]
        rows.append(PlainRow(policy, layout, own, heads, [PlainTrigger() for _ in heads]))
    return rows


@pytest.mark.parametrize("execution", ["dense", "offload"])
@examples(1.5)
@given(policy=variants(LOUISKV), case=cases())
def test_every_step(execution: str, policy: Policy, case: Case):
    """Units, attended positions and outputs are those of the plain program, over all turns and chunks."""
    layout = case.layout()
    text, layer = case.text(layout), case.layer(policy, execution)
    rows = plain_rows(policy, case, layout, text)
    for call in case.calls():
        out = make_call(layer, text, case, call)
        for row, num in zip(rows, case.num_real(call)):
            row.read(num) if call.is_prompt else row.step()
        for batch, row in enumerate(rows):
            for index, head in enumerate(row.heads):
                closed = int(layer.ledger.num_closed[batch, index])
                assert unit_positions(layer, batch, index, closed) == head.left + head.closed
        if not call.is_prompt:
            expected = [[head.attended() for head in row.heads] for row in rows]
            assert attended(layer) == expected
            own = attention_over(text, case, layout, call.start, expected)
            torch.testing.assert_close(out, own, atol=1e-10, rtol=1e-10)
