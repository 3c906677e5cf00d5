"""What scorers note of tokens: it stays with its token, and what they are told of attention is what was attended."""

from typing import Any

import pytest
import torch
from attrs import field, frozen
from hypothesis import given
from torch import Tensor

import kvframe
from kvframe import MeanKey, Policy, PromptInputs, StepInputs
from kvframe.memory.notes import TokenNotes
from kvframe.runtime import RetrievalLayer
from kvframe.testing.cases import Case, attended, make_call, make_layout
from kvframe.testing.strategies import cases, compositions

EXECUTIONS = pytest.mark.parametrize("execution", ["dense", "offload"])


@frozen(kw_only=True)
class Noting(MeanKey):
    """Notes of every token the first number of its key, and adds up what attention it gets."""

    name = "noting"
    reads_prompt = True
    reads_attention = True
    keep_values: bool = True
    weights: list[Tensor] = field(factory=list, eq=False)

    @property
    def num_notes(self) -> int:
        return 2

    def observe_prompt(self, prompt: PromptInputs, state: Any) -> None:
        new = slice(prompt.keys.shape[1] - prompt.query.shape[1], None)
        assert not prompt.notes[:, :, new].any()
        prompt.notes[0, :, new] = prompt.keys[:, new, 0]

    def observe(self, inputs: StepInputs, weights: Tensor, state: Any) -> None:
        assert inputs.notes is not None and inputs.key is not None and inputs.num_tokens is not None
        inputs.notes[0].scatter_(-1, inputs.num_tokens[..., None] - 1, inputs.key[..., :1].float())
        inputs.notes[1] += weights.sum(2)
        self.weights.append(weights)


def noting(policy: Policy) -> tuple[Policy, Noting]:
    """The policy with that scorer."""
    scorer = Noting()
    return policy.swap(scorer=scorer), scorer


def noted(layer: RetrievalLayer, batch: int) -> Tensor:
    """Notes of one sequence by position, [2, H, n]."""
    length = layer.ledger.lengths[batch]
    notes, positions = layer.catalog.notes.of(batch, 0, length), layer.positions.of(batch, length)
    return torch.zeros_like(notes).scatter_(-1, positions.expand_as(notes), notes)


@EXECUTIONS
@given(policy=compositions(), case=cases())
def test_notes_stay_with_their_token(execution: str, policy: Policy, case: Case):
    """Whatever blocks a prompt comes in, and whatever is grouped anew later: a token's note is its own, and all
    attention since it came has gone to it."""
    policy, scorer = noting(policy)
    layer = case.layer(policy, execution)
    text = case.text(layer.layout)
    received = torch.zeros(*text.keys.shape[:3])
    for call in case.calls():
        make_call(layer, text, case, call)
        if not call.is_prompt:
            for batch, padding in enumerate(case.padding):
                length = layer.ledger.lengths[batch]
                positions = layer.positions.of(batch, length)
                own = scorer.weights[-1][batch].sum(1).float()[:, :length]
                received[batch, :, padding : padding + length].scatter_add_(-1, positions, own)
        for batch, padding in enumerate(case.padding):
            stop = max(0, call.stop - padding)
            notes = noted(layer, batch)
            assert notes.shape[-1] == stop
            assert torch.equal(notes[0], text.keys[batch, :, padding : padding + stop, 0].float())
            torch.testing.assert_close(notes[1], received[batch, :, padding : padding + stop], atol=1e-5, rtol=0)


@EXECUTIONS
@given(policy=compositions(), case=cases(max_turns=2))
def test_attention_that_is_observed(execution: str, policy: Policy, case: Case):
    """Every row that is attended to gets something, no other one does, and the shares of a query head add up to 1."""
    policy, scorer = noting(policy)
    layer = case.layer(policy, execution)
    text = case.text(layer.layout)
    for call in case.calls():
        make_call(layer, text, case, call)
        if call.is_prompt:
            continue
        weights, seen = scorer.weights[-1], attended(layer)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-12, rtol=0)
        for batch in range(case.batch_size):
            positions = layer.positions.of(batch, weights.shape[-1])
            for head in range(case.num_kv_heads):
                for own in weights[batch, head]:
                    assert sorted(positions[head][own > 0].tolist()) == seen[batch][head]


def test_a_block_that_is_reordered():
    """Each head in its own order; the rows before and behind it stay."""
    layout = make_layout(batch_size=2, num_kv_heads=2)
    notes = TokenNotes(layout, 1, 8)
    notes.tensor[0, 1] = torch.arange(16.0).view(2, 8)
    notes.reorder(1, 3, torch.tensor([[2, 0, 1], [1, 2, 0]]))

    assert notes.tensor[0, 1].tolist() == [[0, 1, 2, 5, 3, 4, 6, 7], [8, 9, 10, 12, 13, 11, 14, 15]]
    assert not notes.tensor[0, 0].any()


def test_room():
    """More rows come without notes, and what was noted stays; when all is forgotten, room stays."""
    notes = TokenNotes(make_layout(), 3, 4)
    notes.tensor.fill_(7)
    notes.reserve(6)
    notes.reserve(5)

    assert notes.tensor.shape == (3, 2, 2, 6) and notes.nbytes() == 3 * 2 * 2 * 6 * 4
    assert (notes.tensor[..., :4] == 7).all() and not notes.tensor[..., 4:].any()
    notes.forget()
    assert not notes.tensor.any() and notes.tensor.shape[-1] == 6


@EXECUTIONS
def test_a_crop_keeps_notes(execution: str):
    """A prompt that is cut down and taken in again: each token that is left keeps what was noted of it."""
    policy, _ = noting(kvframe.policy("louiskv", sink_size=1, window_size=3, dense_layers=(), token_budget=16))
    case = Case()
    layer = case.layer(policy, execution)
    text = case.text(layer.layout)
    for call in case.calls():
        make_call(layer, text, case, call)
    before = [noted(layer, batch) for batch in range(2)]
    layer.crop(20)

    for batch in range(2):
        assert torch.equal(noted(layer, batch), before[batch][..., :-20])
