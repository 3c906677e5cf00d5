"""Calls with proposed tokens behind the first: cropping them, keeping them, and cropping deeper than they reach."""

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvframe import EveryStep, Policy
from kvframe.dense_layer import DenseLayer
from kvframe.runtime import RetrievalLayer
from kvframe.testing.cases import Case, Text, Trace, Turn, assert_equal_traces, attended, make_call, play
from kvframe.testing.reference import attention_over
from kvframe.testing.strategies import cases, compositions

EXECUTIONS = pytest.mark.parametrize("execution", ["dense", "offload"])


def short_cases() -> st.SearchStrategy[Case]:
    """One or two turns; proposals come in the steps of the last."""
    return cases(max_turns=2, max_prompt=40, max_steps=12)


def with_proposals(text: Text, column: int, num_tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The token in a column and proposed ones behind it, which are not those of the text."""
    generator = torch.Generator().manual_seed(seed)
    extended = []
    for part in text.span(column, column + 1):
        shape = (*part.shape[:2], num_tokens, part.shape[3])
        extended.append(torch.cat([part, torch.randn(shape, generator=generator, dtype=part.dtype)], 2))
    query, keys, values = extended
    return query, keys, values


def play_and_propose(layer: RetrievalLayer, text: Text, case: Case, proposals: list[int]) -> Trace:
    """As `play`, but every step proposes that many tokens, all of which are cropped; their outputs are dropped."""
    trace, step = Trace(), 0
    for call in case.calls():
        if call.is_prompt:
            trace.prompts.append(make_call(layer, text, case, call))
            continue
        num_tokens = proposals[step % len(proposals)]
        lengths = layer.lengths
        out = layer.decode(*with_proposals(text, call.start, num_tokens, step))
        assert layer.lengths == [length + 1 + num_tokens for length in lengths]
        layer.crop(num_tokens)
        assert layer.lengths == [length + 1 for length in lengths]
        trace.outputs.append(out[:, :, :1])
        trace.attended.append(attended(layer))
        step += 1
    return trace


@EXECUTIONS
@given(policy=compositions(), case=short_cases(), proposals=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_cropped_proposals_leave_no_trace(execution: str, policy: Policy, case: Case, proposals: list[int]):
    """A run whose proposals are all rejected equals one that never proposed."""
    text = case.text(case.layout())
    plain = play(case.layer(policy, execution), text, case)

    assert_equal_traces(plain, play_and_propose(case.layer(policy, execution), text, case, proposals), 1e-10)


def warm(case: Case, policy: Policy, execution: str) -> tuple[RetrievalLayer, Text, int]:
    """A layer after all of a case, its text with some tokens more, and the next column."""
    longer = evolve(case, turns=(*case.turns, Turn(chunks=(20,), num_steps=0)))
    layer = case.layer(policy, execution)
    text = longer.text(layer.layout)
    for call in case.calls():
        make_call(layer, text, case, call)
    return layer, text, case.num_tokens


def expected_outputs(text: Text, case: Case, layer: RetrievalLayer, column: int, num_queries: int) -> Tensor:
    """Query t attends to what the first one attends to, and to the proposed tokens before it and itself."""
    positions, outputs = attended(layer), []
    for t in range(num_queries):
        seen = [
            [own + list(range(column + 1 - padding, column + 1 + t - padding)) for own in rows]
            for rows, padding in zip(positions, case.padding)
        ]
        outputs.append(attention_over(text, case, layer.layout, column + t, seen))
    return torch.cat(outputs, 2)


@EXECUTIONS
@given(policy=compositions(plain=True), case=short_cases(), num_tokens=st.integers(1, 6))
def test_outputs_of_proposed_tokens(execution: str, policy: Policy, case: Case, num_tokens: int):
    """Each proposed token sees what the call's first token selected, and the proposed tokens up to itself."""
    layer, text, column = warm(case, policy, execution)
    out = layer.decode(*text.span(column, column + 1 + num_tokens))
    expected = expected_outputs(text, case, layer, column, 1 + num_tokens)

    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)


@EXECUTIONS
@given(policy=compositions(), case=short_cases(), kept=st.integers(0, 4), cropped=st.integers(0, 4))
def test_cropping_a_part(execution: str, policy: Policy, case: Case, kept: int, cropped: int):
    """Cropping the last of the proposed tokens is the same as never having proposed those."""
    traces = []
    for more in (0, cropped):
        layer, text, column = warm(case, policy, execution)
        out = layer.decode(*text.span(column, column + 1 + kept + more))
        if more:
            layer.crop(more)
        trace = Trace(outputs=[out[:, :, : 1 + kept]], attended=[attended(layer)])
        for step in range(column + 1 + kept, column + 5 + kept):
            trace.outputs.append(layer.decode(*text.span(step, step + 1)))
            trace.attended.append(attended(layer))
        traces.append(trace)

    assert_equal_traces(*traces, 1e-10)


@EXECUTIONS
@given(policy=compositions(plain=True), case=short_cases(), kept=st.integers(1, 6))
def test_kept_proposals_are_text(execution: str, policy: Policy, case: Case, kept: int):
    """Proposed tokens that stay enter units and window as if decoded one by one: a trigger that selects at every step
    cannot tell the difference."""
    policy = policy.swap(trigger=EveryStep())
    traces = []
    for proposes in (True, False):
        layer, text, column = warm(case, policy, execution)
        if proposes:
            layer.decode(*text.span(column, column + 1 + kept))
        else:
            for step in range(column, column + 1 + kept):
                layer.decode(*text.span(step, step + 1))
        trace = Trace()
        for step in range(column + 1 + kept, column + 6 + kept):
            trace.outputs.append(layer.decode(*text.span(step, step + 1)))
            trace.attended.append(attended(layer))
        traces.append(trace)
    first, second = traces
    if policy.selector.capacity == 0:
        assert_equal_traces(first, second, 1e-10)
    else:
        assert_equal_traces(second, first, 1e-10)


@EXECUTIONS
@given(policy=compositions(plain=True), case=short_cases(), tail=st.integers(0, 3), data=st.data())
def test_cropping_deeper(execution: str, policy: Policy, case: Case, tail: int, data: st.DataObject):
    """A crop beyond the proposed tokens leaves the run that a prompt of the shorter text starts."""
    layer, text, column = warm(case, policy, execution)
    layer.decode(*text.span(column, column + 1 + tail))
    shortest = min(layer.lengths)
    depth = data.draw(st.integers(tail + 1, shortest), label="depth")
    layer.crop(depth)
    left = column + 1 + tail - depth
    assert layer.lengths == [left - num for num in case.padding]
    fresh = case.layer(policy, execution)
    if left:
        num_real = [left - num for num in case.padding]
        fresh.prompt(*text.span(0, left), num_real, left)
    again, anew = Trace(), Trace()
    for step in range(left, left + 6):
        for trace, run in ((again, layer), (anew, fresh)):
            trace.outputs.append(run.decode(*text.span(step, step + 1)))
            trace.attended.append(attended(run))

    assert_equal_traces(anew, again, 1e-10)


@EXECUTIONS
@given(policy=compositions(plain=True), case=short_cases(), tail=st.integers(1, 4), crop=st.booleans())
def test_proposals_behind_a_prompt(execution: str, policy: Policy, case: Case, tail: int, crop: bool):
    """A prompt whose last tokens are only proposed: cropped, they were never there; kept, they are the first output."""
    policy = policy.swap(trigger=EveryStep())
    num_prompt = case.num_tokens
    text = evolve(case, turns=(Turn(chunks=(num_prompt + 20,), num_steps=0),)).text(case.layout())
    num_real = [num_prompt - num for num in case.padding]
    layer, plain = case.layer(policy, execution), case.layer(policy, execution)
    layer.prompt(*text.span(0, num_prompt + tail), [num + tail for num in num_real], num_prompt)
    plain.prompt(*text.span(0, num_prompt), num_real, num_prompt)
    assert layer.lengths == [num + tail for num in num_real]
    if crop:
        layer.crop(tail)
    else:
        for step in range(num_prompt, num_prompt + tail):
            plain.decode(*text.span(step, step + 1))
    start = num_prompt if crop else num_prompt + tail
    first, second = Trace(), Trace()
    for step in range(start, start + 5):
        for trace, run in ((first, layer), (second, plain)):
            trace.outputs.append(run.decode(*text.span(step, step + 1)))
            trace.attended.append(attended(run))

    assert_equal_traces(second, first, 1e-10)


@given(case=short_cases(), tail=st.integers(0, 4), depth=st.integers(1, 5))
def test_dense_layer(case: Case, tail: int, depth: int):
    """A dense layer forgets what is cropped, however deep."""
    layout = case.layout()
    text = evolve(case, turns=(*case.turns, Turn(chunks=(20,), num_steps=0))).text(layout)
    cropped, plain = DenseLayer(layout, 4), DenseLayer(layout, 4)
    column = case.num_tokens
    num_real = [column - num for num in case.padding]
    for layer in (cropped, plain):
        layer.prompt(*text.span(0, column), num_real, column)
    for step in range(column, column + depth):
        plain.decode(*text.span(step, step + 1))
    cropped.decode(*text.span(column, column + depth + tail))
    for part in text.span(column + depth, column + depth + tail):
        part.neg_()
    cropped.crop(tail)
    step = column + depth
    expected = plain.decode(*text.span(step, step + 1))

    assert cropped.lengths == [num + depth for num in num_real]
    torch.testing.assert_close(cropped.decode(*text.span(step, step + 1)), expected, atol=1e-12, rtol=1e-12)
