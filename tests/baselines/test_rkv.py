"""R-KV (arXiv 2505.24133) by its definition: importance from the last queries, less the redundancy of a key."""

import math

import pytest
from baselines.evicting import CASE, CHUNKED, Sequence, best, dot, mean, sequences_of

import kvframe
from kvframe.testing.cases import Case

WINDOW = 4


def softmax(numbers: list[float]) -> list[float]:
    """Shares that add up to one."""
    weights = [math.exp(number - max(numbers)) for number in numbers]
    return [weight / sum(weights) for weight in weights]


def importance(sequence: Sequence, head: int, candidates: list[int], observers: list[int], kernel: int) -> list[float]:
    """Of the products of each observing query with the candidates the group's largest, softmax, mean, and the largest
    of neighbours in the cache."""
    rows = []
    for position in observers:
        products = [
            max(dot(queries[position], sequence.keys[head][token]) for queries in sequence.queries[head])
            for token in candidates
        ]
        rows.append(softmax([product / math.sqrt(len(sequence.keys[head][0])) for product in products]))
    means = [mean(column) for column in zip(*rows)]
    near = [range(max(0, i - kernel // 2), min(len(means), i + kernel // 2 + 1)) for i in range(len(means))]
    return [max(means[i] for i in reach) for reach in near]


def redundancy(keys: list[list[float]], similarity: float) -> list[float]:
    """Softmax over the mean cosine to the others; each key exempts the newest of those that it resembles."""
    lengths = [math.sqrt(dot(key, key)) for key in keys]
    sums = [0.0] * len(keys)
    for i, one in enumerate(keys):
        cosines = {j: dot(one, keys[j]) / (lengths[i] * lengths[j]) for j in range(len(keys)) if j != i}
        duplicates = [j for j, cosine in cosines.items() if cosine > similarity]
        for j, cosine in cosines.items():
            if not duplicates or j != max(duplicates):
                sums[j] += cosine
    return softmax([total / len(keys) for total in sums])


def kept_by_rkv(
    sequence: Sequence, head: int, *, budget: int, stride: int, mix: float, kernel: int, similarity: float
) -> list[list[int]]:
    """What every step attends to."""
    found, kept = [], list(range(sequence.num_prompt))
    for step, (position, _) in enumerate(sequence.steps()):
        kept.append(position)
        if step % stride == 0:
            candidates, recent = kept[:-WINDOW], kept[-WINDOW:]
            weights = importance(sequence, head, candidates, recent, kernel)
            repeats = redundancy([sequence.keys[head][token] for token in kept], similarity)
            scores = {
                token: mix * weight - (1 - mix) * repeat for token, weight, repeat in zip(candidates, weights, repeats)
            }
            kept = sorted(best(scores, budget)) + recent
        found.append(list(kept))
    return found


@pytest.mark.parametrize("case", [CASE, CHUNKED], ids=["whole", "chunked"])
@pytest.mark.parametrize(
    "options",
    [
        {"mix": 0.1, "kernel_size": 3, "similarity": 0.2, "stride": 6},
        {"mix": 1.0, "kernel_size": 5, "similarity": 0.5, "stride": 4},
        {"mix": 0.0, "kernel_size": 1, "similarity": 0.1, "stride": 1},
    ],
    ids=["mixed", "importance", "redundancy"],
)
def test_every_so_many_steps_the_best_tokens_stay(case: Case, options: dict[str, float]):
    """Between selections all tokens stay; then the budget is filled by the definition's scores over what was left."""
    policy = kvframe.policy("rkv", token_budget=10, window_size=WINDOW, observation_window=WINDOW, **options)
    for sequence in sequences_of(policy, case):
        for head in range(sequence.num_heads):
            expected = kept_by_rkv(
                sequence,
                head,
                budget=10,
                stride=options["stride"],
                mix=options["mix"],
                kernel=options["kernel_size"],
                similarity=options["similarity"],
            )
            assert [heads[head] for heads in sequence.attended] == expected


def test_published_defaults():
    """The last 8 queries, a kernel of 7, cosines above 0.5, a tenth for the attention, every 128 steps."""
    policy = kvframe.policy("rkv")
    scorer = policy.scorer

    assert (scorer.mix, scorer.observation_window, scorer.kernel_size, scorer.similarity) == (0.1, 8, 7, 0.5)
    assert policy.window_size == scorer.observation_window
    assert policy.trigger.stride == policy.selector.room == 128
