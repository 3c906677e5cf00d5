"""H2O (arXiv 2306.14048) by its definition: attention added up over everything, the heaviest tokens and the newest."""

import pytest
from attrs import evolve
from baselines.evicting import CASE, CHUNKED, Sequence, best, sequences_of

import kvframe
from kvframe.testing.cases import Case, Turn


def kept_by_h2o(sequence: Sequence, head: int, heavy: int, window: int, sinks: int) -> list[list[int]]:
    """What every step attends to; one token goes when a step has attended."""
    received = dict.fromkeys(range(len(sequence.keys[head])), 0.0)

    def attend(position: int, seen: set[int]) -> None:
        for shares in sequence.shares(head, position, seen):
            for token, share in shares.items():
                received[token] += share / len(sequence.queries[head])

    for position in range(sequence.num_prompt):
        attend(position, set(range(position + 1)))
    found, kept = [], set(range(sequence.num_prompt))
    for position, _ in sequence.steps():
        recent = set(range(max(0, position - window + 1), position + 1))
        first = set(range(sinks))
        others = {token: received[token] for token in kept - recent - first}
        kept = best(others, heavy) | recent | first
        attend(position, kept)
        found.append(sorted(kept))
    return found


# Short, because what a long prompt has added up is hard to catch up with.
PROMPTS = [evolve(CASE, turns=(Turn(chunks=chunks, num_steps=40),)) for chunks in [(14,), (7, 1, 6)]]


@pytest.mark.parametrize("case", PROMPTS, ids=["whole", "chunked"])
@pytest.mark.parametrize("heavy, window, sinks", [(8, 8, 0), (12, 1, 0), (3, 5, 2)])
def test_heavy_hitters_and_recent_tokens(case: Case, heavy: int, window: int, sinks: int):
    """Every step of every head attends to what the definition keeps; what is gone never comes back."""
    policy = kvframe.policy("h2o", token_budget=heavy, window_size=window, sink_size=sinks)
    generated = 0
    for sequence in sequences_of(policy, case):
        for head in range(sequence.num_heads):
            expected = kept_by_h2o(sequence, head, heavy, window, sinks)
            assert [heads[head] for heads in sequence.attended] == expected
            generated += sum(token >= sequence.num_prompt for token in expected[-1][: heavy + sinks])
    assert generated  # some of them have become heavy


def test_a_prompt_s_attention_counts_each_query_once():
    """What tokens have received when the prompt is read adds up to its length."""
    layer = CHUNKED.layer(kvframe.policy("h2o"), "dense")
    text = CHUNKED.text(layer.layout)
    for call in CHUNKED.calls():
        if call.is_prompt:
            layer.prompt(*text.span(call.start, call.stop), CHUNKED.num_real(call), call.stop - call.start)
    received = layer.catalog.notes.tensor[0].sum(-1)

    for batch, padding in enumerate(CHUNKED.padding):
        assert received[batch].tolist() == pytest.approx([41 - padding] * 2, rel=1e-5)


def test_published_defaults():
    """Half heavy hitters, half recent tokens, at every step and in every layer."""
    policy = kvframe.policy("h2o")

    assert policy.selector.capacity == policy.window_size
    assert (policy.sink_size, policy.dense_layers) == (0, ())
    assert (policy.trigger, policy.units) == (kvframe.EveryStep(), kvframe.TokenUnits())
    assert policy.transfer == kvframe.Drop()
