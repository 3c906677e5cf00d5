"""TOVA (arXiv 2401.06104) by its definition: the token goes that the last query attends to least."""

import pytest
from baselines.evicting import CASE, CHUNKED, Sequence, mean, sequences_of

import kvframe
from kvframe.testing.cases import Case


def kept_by_tova(sequence: Sequence, size: int, heads: list[int]) -> list[list[int]]:
    """What every step attends to, for heads that decide together."""

    def drop(position: int, kept: set[int]) -> set[int]:
        """The `size` tokens that these heads attend to most."""
        shares = [share for head in heads for share in sequence.shares(head, position, kept)]
        ranked = sorted(kept, key=lambda token: (-mean(share[token] for share in shares), token))
        return set(ranked[:size])

    found, kept = [], drop(sequence.num_prompt - 1, set(range(sequence.num_prompt)))
    for position, _ in sequence.steps():
        kept = kept | {position}
        found.append(sorted(kept))
        kept = drop(position, kept)
    return found


@pytest.mark.parametrize("case", [CASE, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize("size", [4, 16, 50])
def test_all_heads_of_a_layer_drop_the_same_token(case: Case, size: int):
    """By the mean over all query heads of the layer."""
    for sequence in sequences_of(kvframe.policy("tova", token_budget=size), case):
        expected = kept_by_tova(sequence, size, list(range(sequence.num_heads)))
        assert sequence.attended == [[step] * sequence.num_heads for step in expected]


def test_each_kv_head_for_itself():
    """With `heads="kv-head"` by the mean over its own query heads."""
    for sequence in sequences_of(kvframe.policy("tova", token_budget=9, heads="kv-head")):
        expected = [kept_by_tova(sequence, 9, [head]) for head in range(sequence.num_heads)]
        assert sequence.attended == [list(step) for step in zip(*expected)]
        assert expected[0] != expected[1]


def test_published_defaults():
    """No sinks, no window but the token itself, every layer."""
    policy = kvframe.policy("tova")

    assert (policy.sink_size, policy.window_size, policy.dense_layers) == (0, 1, ())
    assert (policy.trigger, policy.transfer) == (kvframe.EveryStep(), kvframe.Drop())
