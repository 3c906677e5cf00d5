"""Quest (arXiv 2406.10774) by its definition: min and max of a page's keys, and the bound over the box between them."""

import math

import pytest
from baselines.plain import Step, Vector, best_tokens, mean_of_group, softmax, steps_of

import kvframe


def upper_bounds(step: Step, query: Vector) -> Vector:
    """For each page: over all channels, the sum of the larger of q * min and q * max."""
    bounds = []
    for page in step.units:
        total = 0.0
        for channel, number in enumerate(query):
            smallest = min(step.keys[token][channel] for token in page)
            largest = max(step.keys[token][channel] for token in page)
            total += max(number * smallest, number * largest)
        bounds.append(total)
    return bounds


def reduced(step: Step, reduction: str, normalise: bool) -> Vector:
    """One score a page from those of the query heads."""
    scale = 1 / math.sqrt(len(step.queries[0]))
    scores = [[scale * bound for bound in upper_bounds(step, query)] for query in step.queries]
    if normalise:
        scores = [softmax(numbers) for numbers in scores]
    return mean_of_group(scores) if reduction == "mean" else [max(column) for column in zip(*scores)]


@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_pages_with_the_highest_bounds_are_attended(reduction: str, normalise: bool):
    """At every step a KV head attends to sinks, window and the pages that the bound ranks first."""
    policy = kvframe.policy(
        "quest",
        token_budget=9,
        sink_size=2,
        window_size=4,
        page_size=3,
        group_reduction=reduction,
        softmax=normalise,
    )
    steps = steps_of(policy)
    assert any(len(step.units) > 5 for step in steps)
    for step in steps:
        length = len(step.keys)
        scores = reduced(step, reduction, normalise)
        assert step.retrieved == best_tokens(step.units, scores, 9)
        assert set(step.attended) - step.retrieved == {0, 1, *range(length - step.window, length)}


def test_pages_are_consecutive_and_never_cross_the_sinks():
    """Every page holds 16 tokens in a row; in the prompt the first one begins behind the sinks."""
    for step in steps_of(kvframe.policy("quest", token_budget=4, sink_size=2, window_size=4, page_size=4)):
        assert step.units[0][0] == 2
        for page in step.units:
            assert page == list(range(page[0], page[0] + len(page))) and len(page) <= 4


def test_no_key_exceeds_its_page_s_bound():
    """What makes it a bound: no token's product with the query is larger."""
    for step in steps_of(kvframe.policy("quest", token_budget=4, sink_size=2, window_size=4, page_size=4)):
        for query in step.queries:
            for page, bound in zip(step.units, upper_bounds(step, query)):
                for token in page:
                    assert sum(q * k for q, k in zip(query, step.keys[token])) <= bound + 1e-12


def test_published_defaults():
    """Pages of 16, a budget of 1024, every step, two dense layers, nothing attended besides."""
    policy = kvframe.policy("quest")

    assert (policy.units, policy.trigger) == (kvframe.PageUnits(page_size=16), kvframe.EveryStep())
    assert (policy.selector.capacity, policy.dense_layers) == (1024, (0, 1))
    assert (policy.sink_size, policy.window_size) == (0, 16)
    assert kvframe.policy("quest", offload=False).transfer == kvframe.KeepOnDevice()
