"""The shadow execution: full attention drives, the policy is watched."""

import pytest
import torch
from hypothesis import given

from kvframe import LayerLayout, Policy
from kvframe.memory.dense import ShadowMemory
from kvframe.testing.cases import Case, Text, make_call, play
from kvframe.testing.reference import causal_attention_over
from kvframe.testing.strategies import cases, compositions


@given(policy=compositions(), case=cases())
def test_full_attention_and_the_same_decisions(policy: Policy, case: Case):
    """Outputs are those of full attention; the policy attends, in thought, to what it attends to in `dense`, unless it
    has dropped there what full attention still has."""
    layer = case.layer(policy, "shadow")
    text = case.text(layer.layout)
    expected = causal_attention_over(text, case, layer.layout)
    trace = play(layer, text, case)
    outputs = torch.cat([expected[:, :, call.start : call.stop] for call in case.calls() if not call.is_prompt], 2)

    torch.testing.assert_close(torch.cat(trace.outputs, 2), outputs, atol=1e-10, rtol=1e-10)
    if not policy.transfer.drops:
        assert trace.attended == play(case.layer(policy, "dense"), text, case).attended


def full_weights(text: Text, case: Case, layout: LayerLayout, column: int, batch: int, head: int) -> torch.Tensor:
    """Softmax weights of a step over all positions, meaned over the query heads of a group."""
    keys = text.keys[batch, head, case.padding[batch] : column + 1]
    group = range(head * layout.group_size, (head + 1) * layout.group_size)
    products = [keys @ text.query[batch, qo_head, column] * layout.sm_scale for qo_head in group]
    return torch.stack([torch.softmax(row, 0) for row in products]).mean(0)


@given(policy=compositions(plain=True), case=cases())
def test_what_it_measures(policy: Policy, case: Case):
    """The attended positions' share of the softmax, and of the top positions of the same number; summed over steps."""
    layer = case.layer(policy, "shadow")
    layout, memory = layer.layout, layer.memory
    assert isinstance(memory, ShadowMemory)
    text = case.text(layout)
    mass, recall = (torch.zeros(layout.batch_size, layout.num_kv_heads, dtype=torch.float64) for _ in range(2))
    for call in case.calls():
        make_call(layer, text, case, call)
        for batch in range(layout.batch_size) if not call.is_prompt else ():
            for head in range(layout.num_kv_heads):
                weights = full_weights(text, case, layout, call.start, batch, head)
                positions = layer.attended_positions(batch, head)
                top = weights.topk(len(positions)).indices
                mass[batch, head] += weights[positions].sum()
                recall[batch, head] += len(set(top.tolist()) & set(positions.tolist())) / len(positions)

    torch.testing.assert_close(memory.captured_mass, mass, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(memory.oracle_recall, recall, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("execution, moves", [("offload", True), ("dense", False), ("shadow", False)])
def test_what_moves(execution: str, moves: bool):
    """Only `offload` holds KV on the host and moves bytes; the others count the rows that would have come."""
    import kvframe

    policy = kvframe.policy("louiskv", token_budget=8, sink_size=2, window_size=4, cluster_size=2)
    case = Case()
    layer = case.layer(policy, execution)
    play(layer, case.text(layer.layout), case)
    traffic, recalled = layer.memory.traffic, int(layer.stats.rows_recalled.sum())

    assert recalled > 0
    assert (traffic.bytes_to_host > 0) == (traffic.bytes_to_device(recalled) > 0) == (layer.host_bytes() > 0) == moves
