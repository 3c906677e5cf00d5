"""FreeKV (arXiv 2505.13109) by its definition: last step's pages, corrected for KV heads whose query has turned."""

import pytest
from baselines.plain import CASE, Step, Vector, best_tokens, cosine, mean_of_group, softmax, steps_of
from baselines.test_quest import upper_bounds

import kvframe

NUM_HEADS = CASE.batch_size * CASE.num_kv_heads


def has_turned(before: Step, now: Step, tau: float) -> bool:
    """Is the mean of the cosines of a group's query heads below tau?"""
    cosines = [cosine(old, new) for old, new in zip(before.queries, now.queries)]
    return sum(cosines) / len(cosines) < tau


def page_scores(step: Step, queries: list[Vector]) -> Vector:
    """Softmax over the pages of each query head, then the mean over the group."""
    scale = len(queries[0]) ** -0.5
    return mean_of_group([softmax([scale * bound for bound in upper_bounds(step, query)]) for query in queries])


@pytest.mark.parametrize("tau", [-1.0, 0.9, 0.96, 1.5])
def test_pages_of_the_step_before_unless_the_query_has_turned(tau: float):
    """Heads that have turned, and all at the first step, choose with their own query, the others with the last one."""
    policy = kvframe.policy("freekv", token_budget=9, sink_size=2, window_size=4, page_size=3, tau=tau)
    steps = steps_of(policy)
    kinds = []
    for place, step in enumerate(steps):
        before = steps[place - NUM_HEADS] if place >= NUM_HEADS else None
        corrected = before is None or has_turned(before, step, tau)
        queries = step.queries if before is None or corrected else before.queries
        assert step.retrieved == best_tokens(step.units, page_scores(step, queries), 9)
        kinds.append(corrected)
    assert set(kinds) == ({True} if tau > 1 else {True, False})
    if tau == 0.96:  # heads of one sequence and step differ
        assert any(one != other for one, other in zip(kinds[::2], kinds[1::2]))


def test_published_defaults():
    """Pages of 32, 2048 tokens in all with 128 sinks and 128 recent ones, tau 0.8 for long input."""
    policy = kvframe.policy("freekv")

    assert policy.units == kvframe.PageUnits(page_size=32)
    assert (policy.sink_size, policy.window_size) == (128, 128)
    assert policy.sink_size + policy.selector.capacity + policy.window_size == 2048
    assert policy.trigger.tau == 0.8
