"""SnapKV (arXiv 2404.14469) by its definition: what the end of the prompt attends to, pooled along the text."""

import pytest
from attrs import evolve
from baselines.evicting import CASE, CHUNKED, best, sequences_of
from baselines.observing import kept_after, pooled_attention

import kvframe
from kvframe.testing.cases import Case, Turn, make_call


@pytest.mark.parametrize("case", [CASE, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("pooling, kernel", [("max", 5), ("mean", 3), ("max", 1)])
@pytest.mark.parametrize("room", [30, 6])
def test_the_prompt_is_cut_once(case: Case, pooling: str, kernel: int, room: int):
    """The best tokens of each head stay, the observing ones, and what is generated while there is room."""
    policy = kvframe.policy(
        "snapkv",
        token_budget=7,
        window_size=6,
        observation_window=5,
        kernel_size=kernel,
        pooling=pooling,
        room=room,
    )
    for sequence in sequences_of(policy, case):
        for head in range(sequence.num_heads):
            scores = pooled_attention(sequence, head, 5, kernel, pooling)
            expected = kept_after(sequence, best(scores, 7), 6, room)
            assert [heads[head] for heads in sequence.attended] == expected


@pytest.mark.parametrize("num_prompt", [1, 3, 6, 12])
def test_short_prompts(num_prompt: int):
    """A prompt that is no longer than budget and observing tokens stays whole."""
    case = Case(padding=(0,), batch_size=1, turns=(Turn(chunks=(num_prompt,), num_steps=5),))
    policy = kvframe.policy("snapkv", token_budget=7, window_size=6, observation_window=5, room=20)
    (sequence,) = sequences_of(policy, case)

    for position, heads in sequence.steps():
        assert heads == [list(range(position + 1))] * 2


def test_scores_do_not_depend_on_how_a_prompt_is_stored():
    """In chunks, and in clusters that reorder it, every token gets the note that it gets in one piece and in order."""

    def notes(case: Case, **changes: object) -> list[list[list[float]]]:
        """By sequence, KV head and position, when the prompt has been read."""
        layer = case.layer(kvframe.policy("snapkv", observation_window=8, window_size=3).swap(**changes), "dense")
        text = case.text(layer.layout)
        for call in case.calls():
            if call.is_prompt:
                make_call(layer, text, case, call)
        found = []
        for batch, length in enumerate(layer.lengths):
            place = layer.positions.of(batch, length).argsort(-1)
            found.append(layer.catalog.notes.of(batch, 0, length)[0].gather(-1, place).tolist())
        return found

    expected = notes(CASE)
    for case, units in [
        (CHUNKED, kvframe.TokenUnits()),
        (CASE, kvframe.ClusterUnits(cluster_size=4)),
        (CHUNKED, kvframe.ClusterUnits(cluster_size=4)),
    ]:
        for one, other in zip(expected, notes(case, units=units)):
            for head, same in zip(one, other):
                assert same == pytest.approx(head, rel=1e-5)


def test_a_later_turn_is_observed_by_its_own_text():
    """Of two queries before and one now, the one now is asked, over all that is left."""
    turns = (Turn(chunks=(20,), num_steps=4), Turn(chunks=(1,), num_steps=2))
    case = evolve(CASE, padding=(0, 0), turns=turns)
    options = {"token_budget": 6, "window_size": 2, "observation_window": 3, "kernel_size": 1, "room": 9}
    for sequence in sequences_of(kvframe.policy("snapkv", **options), case):
        for head in range(sequence.num_heads):
            before, after = sequence.attended[3][head], sequence.attended[4][head]
            left = [*before, 24]
            shares = sequence.shares(head, 24, left)
            scores = {token: sum(share[token] for share in shares) for token in before}
            assert after == sorted({*best(scores, 6), 24, 25})


def test_published_defaults():
    """32 observing queries, a kernel of 7, the largest of neighbours; every layer, once."""
    policy = kvframe.policy("snapkv")

    assert (policy.scorer.observation_window, policy.scorer.kernel_size, policy.scorer.pooling) == (32, 7, "max")
    assert policy.window_size == policy.scorer.observation_window + 1
    assert (policy.trigger, policy.transfer, policy.dense_layers) == (kvframe.Once(), kvframe.Drop(), ())
