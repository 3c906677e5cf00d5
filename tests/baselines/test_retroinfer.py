"""RetroInfer (arXiv 2505.02922) by its definition: exact clusters, an estimation zone, and what is left out."""

import math

import pytest
from baselines.plain import CASE, Step, Vector, best_tokens, dot, mean_of_group, softmax, steps_of
from baselines.test_clusterkv import mean, spherical_kmeans

import kvframe

OPTIONS = {"token_budget": 9, "sink_size": 2, "window_size": 4, "cluster_size": 4, "num_iterations": 3}
TEXT = CASE.text(CASE.layout())


def ranked_units(step: Step) -> list[int]:
    """Clusters in the order of their share in a softmax over products with their mean keys, the mean over the group."""
    scale = len(step.queries[0]) ** -0.5
    centroids = [mean([step.keys[token] for token in unit]) for unit in step.units]
    scores = mean_of_group([softmax([scale * dot(query, c) for c in centroids]) for query in step.queries])
    return sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))


def values_of(step: Step) -> list[Vector]:
    """Values of every token so far."""
    start = CASE.padding[step.batch]
    return TEXT.values[step.batch, step.head, start : start + len(step.keys)].tolist()


def output(step: Step, query: Vector, estimated: list[list[int]]) -> Vector:
    """Softmax over exact tokens and one entry for each estimated cluster, n exp(q . c) with the mean of its values."""
    scale, values = len(query) ** -0.5, values_of(step)
    entries = [(math.exp(scale * dot(query, step.keys[token])), values[token]) for token in step.attended]
    for tokens in estimated:
        centroid = mean([step.keys[token] for token in whole(step, tokens[0])])
        value = mean([values[token] for token in whole(step, tokens[0])])
        entries.append((len(tokens) * math.exp(scale * dot(query, centroid)), value))
    total = sum(weight for weight, _ in entries)
    return [sum(weight * value[channel] for weight, value in entries) / total for channel in range(len(values[0]))]


def whole(step: Step, token: int) -> list[int]:
    """The cluster of a token."""
    return next(unit for unit in step.units if token in unit)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block_size", [10, 8192])
def test_exact_estimated_and_left_out(share: float, block_size: int):
    """The best clusters' tokens are attended, the next `share` of all clusters are one entry each, others are not
    there."""
    kinds = set()
    for step in steps_of(kvframe.policy("retroinfer", **OPTIONS, estimated_share=share, block_size=block_size)):
        ranked = ranked_units(step)
        scores = [-ranked.index(unit) for unit in range(len(step.units))]
        assert step.retrieved == best_tokens(step.units, [float(score) for score in scores], 9)
        num_exact, taken = 0, 0
        while num_exact < len(ranked) and taken + len(step.units[ranked[num_exact]]) <= 9:
            taken += len(step.units[ranked[num_exact]])
            num_exact += 1
        zone = ranked[num_exact : num_exact + round(share * len(ranked))]
        rest = [[token for token in step.units[unit] if token not in step.retrieved] for unit in zone]
        for query, out in zip(step.queries, step.out):
            expected = output(step, query, [tokens for tokens in rest if tokens])
            assert out == pytest.approx(expected, rel=1e-9, abs=1e-9)
        kinds.add((taken < 9, len(ranked) > num_exact + len(zone)))
    assert (True, share < 1) in kinds  # some cluster was cut, and some were left out


def test_clusters_of_segments():
    """Each segment of the prompt is clustered alone, one cluster for `cluster_size` tokens."""
    for step in steps_of(kvframe.policy("retroinfer", **OPTIONS, block_size=10)):
        start, stop = 2, step.num_prompt - 4
        expected = []
        for first in range(start, stop, 10):
            keys = step.keys[first : min(first + 10, stop)]
            expected += [
                [token + first for token in cluster] for cluster in spherical_kmeans(keys, max(1, len(keys) // 4), 3)
            ]
        assert [unit for unit in step.units if unit[0] < stop] == expected


def test_clusters_of_generated_tokens():
    """A block of them is clustered when it has left the window."""
    clustered = set()
    for step in steps_of(kvframe.policy("retroinfer", **OPTIONS, output_block_size=8)):
        start = step.num_prompt - 4
        stop = start + 8
        if len(step.keys) > stop + 4:
            expected = spherical_kmeans(step.keys[start:stop], 2, 3)
            found = [unit for unit in step.units if start <= unit[0] < stop]
            assert found == [[token + start for token in cluster] for cluster in expected]
            clustered.add(tuple(map(len, found)))
    assert len(clustered) > 1


def test_published_defaults():
    """Segments of 8192 and 1024, clusters of 16, 23.2 % estimated, 4 sinks and 64 recent tokens."""
    policy = kvframe.policy("retroinfer")

    clusters = policy.units.units
    assert (clusters.block_size, clusters.cluster_size) == (8192, 16)
    assert (policy.units.by, policy.units.block_size) == (clusters, 1024)
    assert policy.selector.estimated_share == 0.232
    assert (policy.sink_size, policy.window_size) == (4, 64)
