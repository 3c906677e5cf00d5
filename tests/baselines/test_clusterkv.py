"""ClusterKV (arXiv 2412.03213) by its definition: spherical k-means, centroids ranked, the last cluster trimmed."""

import math

import pytest
from baselines.plain import Step, Vector, best_tokens, mean_of_group, steps_of

import kvframe


def dot(one: Vector, other: Vector) -> float:
    """Scalar product."""
    return sum(x * y for x, y in zip(one, other, strict=True))


def mean(vectors: list[Vector]) -> Vector:
    """Channel by channel."""
    return [sum(column) / len(column) for column in zip(*vectors, strict=True)]


def unit_length(vector: Vector) -> Vector:
    """The direction of a vector."""
    length = math.sqrt(dot(vector, vector))
    return [number / length for number in vector]


def spherical_kmeans(keys: list[Vector], num_clusters: int, num_iterations: int) -> list[list[int]]:
    """Clusters of keys by cosine, after their mean is taken off, from evenly spaced seeds; empty ones are left out."""
    middle = mean(keys)
    points = [unit_length([number - m for number, m in zip(key, middle)]) for key in keys]
    centroids = [points[cluster * len(keys) // num_clusters] for cluster in range(num_clusters)]
    for iteration in range(num_iterations + 1):
        nearest = [max(range(num_clusters), key=lambda c: (dot(point, centroids[c]), -c)) for point in points]
        members = [[i for i, own in enumerate(nearest) if own == cluster] for cluster in range(num_clusters)]
        if iteration < num_iterations:
            centroids = [
                unit_length(mean([points[i] for i in own])) if own else old for own, old in zip(members, centroids)
            ]
    return [own for own in members if own]


def ranking(step: Step) -> Vector:
    """For each unit the product of the query with its centroid, the mean of its members' keys, over the group."""
    centroids = [mean([step.keys[token] for token in unit]) for unit in step.units]
    return mean_of_group([[dot(query, centroid) for centroid in centroids] for query in step.queries])


OPTIONS = {
    "token_budget": 9,
    "sink_size": 2,
    "window_size": 4,
    "cluster_size": 4,
    "num_iterations": 3,
    "output_block_size": 8,
}


def test_the_prompt_s_clusters():
    """Between sinks and window one cluster for `cluster_size` tokens, of the whole prompt at once, none split."""
    sizes = set()
    for step in steps_of(kvframe.policy("clusterkv", **OPTIONS)):
        start, stop = 2, step.num_prompt - 4
        found = [unit for unit in step.units if unit[0] < stop]
        expected = spherical_kmeans(step.keys[start:stop], (stop - start) // 4, 3)
        assert found == [[token + start for token in cluster] for cluster in expected]
        sizes |= {len(cluster) for cluster in found}
    assert len(sizes) > 3  # they are no runs


def test_clusters_of_generated_tokens():
    """A block of them is clustered, alone, when it has left the window; before, its tokens are in runs."""
    clustered, waiting = set(), 0
    for step in steps_of(kvframe.policy("clusterkv", **OPTIONS)):
        start = step.num_prompt - 4
        stop = start + 8
        found = [unit for unit in step.units if start <= unit[0] < stop]
        if len(step.keys) > stop + 4:
            expected = spherical_kmeans(step.keys[start:stop], 2, 3)
            assert found == [[token + start for token in cluster] for cluster in expected]
            clustered.add(tuple(map(len, found)))
        else:
            waiting += len(found)
            assert all(unit == list(range(unit[0], unit[0] + len(unit))) and len(unit) <= 4 for unit in found)
    assert len(clustered) > 1 and waiting


def test_the_best_clusters_are_attended():
    """At every step whole clusters in the order of q . centroid, the last one cut; no softmax anywhere."""
    steps = steps_of(kvframe.policy("clusterkv", **OPTIONS))
    assert any(len(step.units) > 5 for step in steps)
    for step in steps:
        length = len(step.keys)
        assert step.retrieved == best_tokens(step.units, ranking(step), 9)
        assert set(step.attended) - step.retrieved == {0, 1, *range(length - step.window, length)}


@pytest.mark.parametrize("num_tokens, expected", [(800, 10), (100, 1), (79, 1)])
def test_published_number_of_clusters(num_tokens: int, expected: int):
    """One for 80 tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    units = kvframe.policy("clusterkv").units.build(torch.randn(1, num_tokens, 16, generator=generator))

    assert int(units.num_units) == expected


def test_published_defaults():
    """16 sinks, a budget of 1024, two dense layers; 320 generated tokens make 4 clusters, the prompt is one block."""
    policy = kvframe.policy("clusterkv")

    assert (policy.sink_size, policy.selector.capacity, policy.dense_layers) == (16, 1024, (0, 1))
    clusters = policy.units.by
    assert policy.units.regroup_size == policy.window_size == clusters.cluster_size * 4 == 320
    assert clusters.block_size is None is clusters.split_factor and policy.units.units == clusters
    assert policy.trigger == kvframe.EveryStep()
