"""Clusters of the prompt."""

import pytest
import torch
from helpers import unit_lists
from hypothesis import given
from hypothesis import strategies as st

from kvframe import ClusterUnits
from kvframe.errors import ConfigError
from kvframe_kernels.kmeans import kmeans


@given(
    num_tokens=st.integers(1, 90),
    cluster_size=st.integers(1, 6),
    block_size=st.integers(1, 40) | st.just(8192),
    split_factor=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_clusters(num_tokens: int, cluster_size: int, block_size: int, split_factor: int, seed: int):
    """Each block of the prompt is clustered alone, into its length over `cluster_size` clusters, none too large."""
    keys = torch.randn(2, num_tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    builder = ClusterUnits(
        cluster_size=cluster_size, block_size=block_size, num_iterations=2, split_factor=split_factor
    )
    units = builder.build(keys)
    for head in range(2):
        expected = []
        for start in range(0, num_tokens, block_size):
            block = keys[head : head + 1, start : start + block_size]
            num_clusters = max(1, block.shape[1] // cluster_size)
            order, sizes, count = kmeans(block, num_clusters, 2, split_factor * cluster_size)
            parts = (order[0] + start).split(sizes[0, : int(count)].tolist())
            expected += [part.tolist() for part in parts]
        found = unit_lists(units, head)
        assert found == expected
        assert all(len(unit) <= split_factor * cluster_size and unit == sorted(unit) for unit in found)
        assert (units.sizes[head, int(units.num_units[head]) :] == 0).all()


def test_clusters_hold_what_is_alike():
    """Tokens whose keys point the same way share a unit, wherever they lie in the prompt."""
    generator = torch.Generator().manual_seed(0)
    topics = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    topic = torch.arange(32) % 4
    keys = (5 * topics[topic] + 0.1 * torch.randn(32, 3, generator=generator))[None]
    keys = keys[:, torch.randperm(32, generator=torch.Generator().manual_seed(7))]
    label = (keys[0] @ topics.T).argmax(-1)
    units = unit_lists(ClusterUnits(cluster_size=4).build(keys), 0)

    assert all(len({int(label[token]) for token in unit}) == 1 for unit in units)
    assert any(unit != list(range(unit[0], unit[-1] + 1)) for unit in units)


@pytest.mark.parametrize("name", ["cluster_size", "block_size", "split_factor", "num_iterations"])
@pytest.mark.parametrize("value", [-1, 2.5, "4", True])
def test_cluster_options_that_are_none(name: str, value: object):
    """Sizes are whole numbers; the message names field and value."""
    with pytest.raises(ConfigError, match=rf"ClusterUnits\.{name} must be an integer >= [01]( or None)?, got"):
        ClusterUnits(**{name: value})


def test_smallest_cluster_options():
    """No iteration at all leaves the seeds' first assignment; a size of zero is refused."""
    assert ClusterUnits(num_iterations=0, cluster_size=1, block_size=1, split_factor=1).unit_size == 1
    for name in ("cluster_size", "block_size", "split_factor"):
        with pytest.raises(ConfigError, match=rf"{name} must be an integer >= 1( or None)?, got 0"):
            ClusterUnits(**{name: 0})


def test_whole_prompts_and_whole_clusters():
    """Without a block size all tokens are clustered together; without a split factor no cluster is cut."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(1, 60, 4, generator=generator, dtype=torch.float64)
    keys[:, :40] = keys[:, :1]  # one cluster has to hold two thirds of the tokens
    units = unit_lists(ClusterUnits(cluster_size=10, block_size=None, split_factor=None).build(keys), 0)
    order, sizes, count = kmeans(keys, 6, 10, 60)

    assert units == [part.tolist() for part in order[0].split(sizes[0, : int(count)].tolist())]
    assert max(map(len, units)) >= 40
