"""Twilight (arXiv 2502.02770) by its definition: of generous candidates the fewest that hold the share p, in 4 bits."""

import pytest
from baselines.plain import Step, Vector, best_tokens, dot, mean_of_group, softmax, steps_of
from baselines.test_quest import reduced

import kvframe


def in_few_bits(key: Vector, bits: int) -> Vector:
    """A key on 2^bits levels, evenly and symmetrically about zero."""
    most = 2**bits - 1
    step = 2 * max(map(abs, key)) / most
    return [(min(max(round(number / step + most / 2), 0), most) - most / 2) * step for number in key]


def fewest(step: Step, candidates: set[int], p: float, bits: int) -> set[int]:
    """The candidates with the largest weights, until they hold p of the attention to all candidates."""
    scale, tokens = len(step.queries[0]) ** -0.5, sorted(candidates)
    keys = [in_few_bits(step.keys[token], bits) for token in tokens]
    weights = mean_of_group([softmax([scale * dot(query, key) for key in keys]) for query in step.queries])
    taken: set[int] = set()
    held = 0.0
    for place in sorted(range(len(tokens)), key=lambda place: (-weights[place], tokens[place])):
        if taken and held >= p:
            break
        taken.add(tokens[place])
        held += weights[place]
    return taken


@pytest.mark.parametrize("p", [0.0, 0.5, 0.85])
@pytest.mark.parametrize("bits", [4, 8])
def test_as_many_tokens_as_hold_p(p: float, bits: int):
    """At every step, from Quest's pages; heads differ in how many they need."""
    policy = kvframe.policy("twilight", token_budget=18, sink_size=2, window_size=4, page_size=3, p=p, bits=bits)
    counts = set()
    for step in steps_of(policy):
        candidates = best_tokens(step.units, reduced(step, "mean", True), 18)
        assert step.retrieved == fewest(step, candidates, p, bits)
        counts.add(len(step.retrieved))
    assert max(counts) < 18 and (len(counts) > 3 or p == 0)


def test_all_of_p_takes_all():
    """p = 1 leaves the other selector's choice as it is."""
    options = {"token_budget": 9, "sink_size": 2, "window_size": 4, "page_size": 3}
    for step in steps_of(kvframe.policy("twilight", **options, p=1.0)):
        assert step.retrieved == best_tokens(step.units, reduced(step, "mean", True), 9)


def test_published_defaults():
    """8192 candidates, 85 %, 4 bits."""
    selector = kvframe.policy("twilight").selector

    assert (selector.capacity, selector.p, selector.bits) == (8192, 0.85, 4)
