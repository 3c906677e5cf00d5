"""RefreshKV (arXiv 2411.05787) by its definition: full steps where the query has moved, and what they weigh highest."""

import pytest
from baselines.plain import CASE, Step, Vector, attention, best_tokens, cosine, steps_of

import kvframe
from kvframe.testing.cases import Case

OPTIONS = {"token_budget": 9, "sink_size": 2, "window_size": 4, "stride": 3, "kernel_size": 3}
PROMPT = sum(CASE.turns[0].chunks)


def pooled(queries: list[Vector], keys: list[Vector]) -> Vector:
    """For each token the largest weight that any query of the group gives it or a direct neighbour."""
    best = [max(column) for column in zip(*attention(queries, keys))]
    return [max(best[max(0, token - 1) : token + 2]) for token in range(len(best))]


def prompt_queries(case: Case) -> list[list[Vector]]:
    """Of the prompt's last token, for every sequence and query head."""
    return case.text(case.layout()).query[:, :, PROMPT - 1].tolist()


@pytest.mark.parametrize("tau", [-1.0, 0.5, 0.9, 1.5])
@pytest.mark.parametrize("offload", [True, False])
def test_full_steps_and_what_follows_them(tau: float, offload: bool):
    """Every third step compares; a step that has moved attends to everything, and what it weighs highest serves on."""
    steps = steps_of(kvframe.policy("refreshkv", **OPTIONS, tau=tau, offload=offload))
    group, kinds = CASE.group_size, set()
    reference = prompt_queries(CASE)
    small: dict[tuple[int, int], set[int] | None] = {}
    weights: dict[tuple[int, int], Vector] = {}
    per_step = CASE.batch_size * CASE.num_kv_heads
    for number in range(len(steps) // per_step):
        now = steps[number * per_step : (number + 1) * per_step]
        for batch in range(CASE.batch_size):
            heads = [step for step in now if step.batch == batch]
            queries = [query for step in heads for query in step.queries]
            cosines = [cosine(old, new) for old, new in zip(reference[batch], queries)]
            full = (number + 1) % 3 == 0 and sum(cosines) / len(cosines) <= tau
            kinds.add(full)
            for step in heads:
                own = batch, step.head
                if number == 0:
                    last = reference[batch][step.head * group : (step.head + 1) * group]
                    weights[own] = pooled(last, step.keys[: step.num_prompt])
                    small[own] = None
                if full:
                    assert step.attended == list(range(len(step.keys)))
                    continue
                if small.get(own) is None:
                    small[own] = expected(step, weights[own])
                assert step.retrieved == small[own]
            if full:
                reference[batch] = queries
                for step in heads:
                    weights[batch, step.head] = pooled(step.queries, step.keys)
                    small[batch, step.head] = None
    assert kinds == ({False} if tau < 0 else {True, False})


def expected(step: Step, weights: Vector) -> set[int]:
    """The best tokens by the weights of the last full step; one that came later has none."""
    behind = [0.0] * (len(step.keys) - len(weights))
    known = weights + behind
    return best_tokens(step.units, [known[unit[0]] for unit in step.units], 9)


def test_published_defaults():
    """A comparison every 5 steps, all KV on the device; single tokens."""
    policy = kvframe.policy("refreshkv")

    assert policy.trigger.stride == 5
    assert (policy.units, policy.transfer) == (kvframe.TokenUnits(), kvframe.KeepOnDevice())
