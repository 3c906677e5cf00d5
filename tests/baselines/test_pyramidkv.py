"""PyramidKV (arXiv 2406.02069) by its definition: SnapKV's scores under budgets that fall from layer to layer."""

import pytest
from baselines.evicting import CASE, best, sequences_of
from baselines.observing import kept_after, pooled_attention

import kvframe
from kvframe.testing.cases import make_layout


def budgets(mean: int, beta: int, num_layers: int) -> list[int]:
    """An arithmetic sequence that ends with `mean` / `beta` and has this mean."""
    top = mean / beta
    step = 2 * (mean - top) / (num_layers - 1)
    return [round(top + step * above) for above in reversed(range(num_layers))]


@pytest.mark.parametrize("layer_idx", [0, 1, 3])
def test_each_layer_keeps_its_own_number(layer_idx: int):
    """The best tokens of SnapKV's scores, as many as the layer's budget."""
    options = {"window_size": 6, "observation_window": 5, "kernel_size": 3, "room": 30}
    policy = kvframe.policy("pyramidkv", token_budget=8, beta=4, **options)
    for sequence in sequences_of(policy, CASE, layer_idx=layer_idx, num_layers=4):
        for head in range(sequence.num_heads):
            scores = pooled_attention(sequence, head, 5, 3, "mean")
            expected = kept_after(sequence, best(scores, budgets(8, 4, 4)[layer_idx]), 6, 30)
            assert [heads[head] for heads in sequence.attended] == expected


@pytest.mark.parametrize("mean, beta, num_layers", [(1024, 20, 32), (128, 20, 30), (7, 3, 5), (5, 20, 4)])
def test_budgets(mean: int, beta: int, num_layers: int):
    """They fall from twice the mean, less the top layer's, to the top layer's, and nothing is without one."""
    selector = kvframe.policy("pyramidkv", token_budget=mean, beta=beta, room=0).selector
    found = [
        selector.capacity_in(make_layout(layer_idx=layer_idx, num_layers=num_layers)) for layer_idx in range(num_layers)
    ]

    assert found == [max(1, budget) for budget in budgets(mean, beta, num_layers)]
    assert abs(sum(found) - mean * num_layers) <= num_layers / 2 + 1


def test_a_single_layer():
    """It has the mean."""
    assert kvframe.policy("pyramidkv", token_budget=9, room=2).selector.capacity_in(make_layout()) == 11


def test_published_defaults():
    """beta 20, 64 observing queries, the mean of 5 neighbours."""
    policy = kvframe.policy("pyramidkv")

    assert policy.selector.beta == 20
    assert (policy.scorer.observation_window, policy.scorer.kernel_size, policy.scorer.pooling) == (64, 5, "mean")
    assert policy.window_size == policy.scorer.observation_window + 1
