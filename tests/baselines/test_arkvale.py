"""ArkVale (NeurIPS 2024) by its definition: a digest around the middle of a page's keys, and the product's largest."""

import math

import pytest
from baselines.plain import Step, Vector, best_tokens, mean_of_group, softmax, steps_of

import kvframe


def digest(step: Step, page: list[int], box: str) -> tuple[Vector, Vector]:
    """Centre of a page's keys in each channel, and how far the box reaches from it."""
    centre, reach = [], []
    for channel in range(len(step.keys[0])):
        numbers = [step.keys[token][channel] for token in page]
        middle = (min(numbers) + max(numbers)) / 2
        distances = [abs(number - middle) for number in numbers]
        centre.append(middle)
        reach.append(max(distances) if box == "full" else sum(distances) / len(distances))
    return centre, reach


def importance(step: Step, query: Vector, box: str) -> Vector:
    """For each page the largest product of the query with a point of its box: q * centre + |q| * reach, summed."""
    scores = []
    for page in step.units:
        centre, reach = digest(step, page, box)
        total = sum(q * c + abs(q) * r for q, c, r in zip(query, centre, reach, strict=True))
        scores.append(total / math.sqrt(len(query)))
    return scores


@pytest.mark.parametrize("box", ["full", "mean-deviation"])
def test_the_most_important_pages_are_attended(box: str):
    """At every step a KV head attends to sinks, window and the pages whose digests rank first."""
    policy = kvframe.policy("arkvale", token_budget=9, sink_size=2, window_size=4, page_size=3, box=box)
    steps = steps_of(policy)
    assert any(len(step.units) > 5 for step in steps)
    for step in steps:
        length = len(step.keys)
        scores = mean_of_group([softmax(importance(step, query, box)) for query in step.queries])
        assert step.retrieved == best_tokens(step.units, scores, 9)
        assert set(step.attended) - step.retrieved == {0, 1, *range(length - step.window, length)}


def test_published_defaults():
    """Pages of 32, of which 32 are recalled; two pages of sinks and two of window; two dense layers."""
    policy = kvframe.policy("arkvale")

    assert (policy.units, policy.trigger) == (kvframe.PageUnits(page_size=32), kvframe.EveryStep())
    assert (policy.selector.capacity, policy.sink_size, policy.window_size) == (32 * 32, 2 * 32, 2 * 32)
    assert policy.dense_layers == (0, 1)
