"""Ada-KV (arXiv 2407.11550) by its definition: a layer's budget goes to the heads whose tokens rank first."""

import math

import pytest
import torch
from baselines.evicting import CASE, best, sequences_of
from baselines.observing import kept_after, pooled_attention

import kvframe
from kvframe import StepInputs
from kvframe.testing.cases import make_layout, unit_table
from kvframe_baselines import SharedBudget


def shared_out(scores: list[dict[int, float]], mean: int, floor: float) -> list[int]:
    """How many tokens each head keeps, by the best of all heads together, and an even part."""
    tokens = [(score, head) for head, own in enumerate(scores) for score in own.values()]
    winners = sorted(tokens, key=lambda token: -token[0])[: mean * len(scores)]
    adaptive = [sum(head == own for _, head in winners) for own in range(len(scores))]
    return [math.floor((1 - floor) * number + floor * mean + 1e-9) for number in adaptive]


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_heads_share_a_budget(floor: float):
    """Each head keeps its own best tokens, as many as it has been given."""
    options = {"window_size": 6, "observation_window": 5, "kernel_size": 3, "room": 30}
    policy = kvframe.policy("adakv", token_budget=7, floor=floor, **options)
    uneven = False
    for sequence in sequences_of(policy, CASE):
        scores = [pooled_attention(sequence, head, 5, 3, "max") for head in range(sequence.num_heads)]
        numbers = shared_out(scores, 7, floor)
        uneven |= len(set(numbers)) > 1
        for head, number in enumerate(numbers):
            expected = kept_after(sequence, best(scores[head], number), 6, 30)
            assert [heads[head] for heads in sequence.attended] == expected
    assert uneven == (floor < 1)


def test_units_of_many_tokens():
    """A unit that does not fit whole is cut, when budgets are found and when rows are taken."""
    scores = torch.tensor([[[0.9, 0.1, 0.5], [0.8, 0.2, -math.inf]]])
    sizes = torch.tensor([[[3, 2, 4], [2, 5, 9]]])
    layout = make_layout(batch_size=1, num_kv_heads=2)
    inputs = StepInputs(query=torch.zeros(1, 4, 8), layout=layout)
    rows, count = SharedBudget(token_budget=4, floor=0.0, room=1).select(
        inputs, scores, unit_table(sizes, torch.tensor([[3, 2]]))
    )

    # Of 8 tokens the units of 0.9 and 0.8 take 5, and that of 0.5 the last 3.
    assert count.tolist() == [[6, 2]]
    assert rows.tolist() == [[[0, 1, 2, 5, 6, 7, -1, -1, -1], [0, 1, -1, -1, -1, -1, -1, -1, -1]]]


@pytest.mark.parametrize("floor, most", [(0.0, 40), (0.2, 34), (0.5, 25), (1.0, 10)])
def test_no_head_can_get_more(floor: float, most: int):
    """Slots are sized for a head that takes all that is not shared out evenly."""
    assert SharedBudget(token_budget=10, floor=floor).capacity_in(make_layout(num_kv_heads=4)) == most


def test_published_defaults():
    """A fifth is every head's own; SnapKV's window of 32 and kernel of 7."""
    policy = kvframe.policy("adakv")

    assert policy.selector.floor == 0.2
    assert policy.scorer == kvframe.policy("snapkv").scorer
