"""What is true of these two stages alone."""

import torch
from kvframe_example_policy import AdaptiveStride, KeyDirection

import kvframe
from kvframe.testing import make_layout
from kvframe.types import StepInputs, UnitTable


def steps_due(trigger: AdaptiveStride, queries: list[torch.Tensor]) -> list[int]:
    """The steps that select, of one sequence and one KV head."""
    layout = make_layout(batch_size=1, num_kv_heads=1, group_size=2, head_dim=2)
    state = trigger.init(layout)
    trigger.begin(queries[0], state)
    inputs = [StepInputs(query=query, layout=layout) for query in queries]
    return [step for step, each in enumerate(inputs) if trigger.step(each, state).due.item()]


def test_stride_doubles_while_the_query_stays() -> None:
    """1 step after the first selection, then 2, 4, 8 and no more than that."""
    same = torch.ones(1, 2, 2, dtype=torch.float64)

    assert steps_due(AdaptiveStride(max_stride=8), [same] * 32) == [0, 1, 3, 7, 15, 23, 31]


def test_stride_starts_again_where_the_query_turns() -> None:
    """A selection that finds another query is followed by one at the very next step."""
    there = torch.ones(1, 2, 2, dtype=torch.float64)
    back = -there

    assert steps_due(AdaptiveStride(max_stride=8), [there] * 5 + [back] * 8) == [0, 1, 3, 7, 8, 10]


def test_the_best_head_of_a_group_decides() -> None:
    """A unit that one head points at scores 1, however long its keys are."""
    layout = make_layout(batch_size=1, num_kv_heads=1, group_size=2, head_dim=2)
    keys = torch.tensor([[[9.0, 0.0], [7.0, 0.0], [0.0, 0.1], [-1.0, -1.0]]], dtype=torch.float64)
    index = KeyDirection().index(keys, keys, torch.tensor([[0, 0, 1, 2]]), 3)
    query = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]], dtype=torch.float64)
    units = UnitTable(offsets=torch.tensor([[[0, 2, 3, 4]]]), num_units=torch.tensor([[3]]), max_units=3)
    scores = KeyDirection().score(
        StepInputs(query=query, layout=layout), {"direction": index["direction"][None]}, units
    )

    torch.testing.assert_close(scores[0, 0], torch.tensor([1.0, 1.0, -(0.5**0.5)], dtype=torch.float64))


def test_the_policy_by_name() -> None:
    """Options reach the stages."""
    policy = kvframe.policy("steady-pages", tau=0.5, max_stride=4)

    assert policy.trigger == AdaptiveStride(tau=0.5, max_stride=4)
    assert policy.promises == tuple(kvframe.Invariant)
