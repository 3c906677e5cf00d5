"""InfLLM (arXiv 2402.04617) by its definition: blocks stand for themselves by their locally most attended keys."""

import pytest
from baselines.plain import CASE, Step, Vector, best_tokens, dot, softmax, steps_of

import kvframe

OPTIONS = {"token_budget": 10, "sink_size": 2, "window_size": 6, "page_size": 5, "num_keys": 2, "local_size": 4}
TEXT = CASE.text(CASE.layout())
GROUP, BUDGET = CASE.group_size, 10
SCALE = CASE.head_dim**-0.5


def queries_at(batch: int, head: int, position: int) -> list[Vector]:
    """Of the query heads that share a KV head."""
    column = position + CASE.padding[batch]
    return TEXT.query[batch, head * GROUP : (head + 1) * GROUP, column].tolist()


def received(steps: list[Step], batch: int, head: int) -> list[Vector]:
    """What each token has received of attention before each decode step, the mean over the group, summed over queries.

    In the prompt every query looks at the four nearest tokens, itself included; a step at those that it attended to.
    """
    own = [step for step in steps if (step.batch, step.head) == (batch, head)]
    keys = own[-1].keys
    weights = [0.0] * len(keys)

    def look(position: int, seen: list[int]) -> None:
        for query in queries_at(batch, head, position):
            shares = softmax([SCALE * dot(query, keys[token]) for token in seen])
            for token, share in zip(seen, shares):
                weights[token] += share / GROUP

    for position in range(own[0].num_prompt):
        look(position, list(range(max(0, position - 3), position + 1)))
    before = []
    for step in own:
        before.append(list(weights))
        look(len(step.keys) - 1, step.attended)
    return before


def representatives(units: list[list[int]], weights: Vector) -> list[list[int]]:
    """The two tokens of each unit with the largest weights, the earlier one first where they are equal."""
    return [sorted(unit, key=lambda token: (-weights[token], token))[:2] for unit in units]


@pytest.mark.parametrize("heads", ["layer", "kv-head"])
def test_the_blocks_with_the_best_representatives(heads: str):
    """A block's score sums up products with its representatives' keys, over all heads of the layer or the group's."""
    steps = steps_of(kvframe.policy("infllm", **OPTIONS, heads=heads))
    weights = {(batch, head): received(steps, batch, head) for batch in (0, 1) for head in (0, 1)}
    chosen: dict[tuple[int, int, int], list[int]] = {}  # fixed when the block leaves the window
    per_step, moved = CASE.batch_size * CASE.num_kv_heads, False
    for place, step in enumerate(steps):
        number = place // per_step
        known = weights[step.batch, step.head][number]
        for unit, tokens in zip(step.units, representatives(step.units, known)):
            key = (step.batch, step.head, unit[0])
            moved |= key in chosen and chosen[key] != tokens
            # A prompt's block has no attention of later steps.
            first = weights[step.batch, step.head][0]
            in_block = unit[-1] < step.num_prompt - OPTIONS["window_size"]
            tokens = representatives([unit], first)[0] if in_block else tokens
            chosen.setdefault(key, tokens)
    for place, step in enumerate(steps):
        mates = [other for other in steps[place - place % per_step :][:per_step] if other.batch == step.batch]
        asked = mates if heads == "layer" else [step]
        scores = [
            sum(
                dot(query, other.keys[token])
                for other in asked
                for query in other.queries
                for token in chosen[other.batch, other.head, unit[0]]
            )
            / len(chosen[step.batch, step.head, unit[0]])
            for unit in step.units
        ]
        assert step.retrieved == best_tokens(step.units, scores, BUDGET)
    assert moved  # what came later would have changed some block's representatives, and did not


def test_published_defaults():
    """Blocks of 128, 4 representatives, 16 blocks, 128 first tokens and 4096 recent ones."""
    policy = kvframe.policy("infllm")

    assert (policy.units.page_size, policy.scorer.num_keys, policy.scorer.local_size) == (128, 4, 4096)
    assert policy.selector.capacity == 16 * 128
    assert (policy.sink_size, policy.window_size) == (128, 4096)
