"""A budget beyond the context is full attention, with the retrieval path running."""

import pytest
import torch
from helpers import policy_records
from hypothesis import assume, given
from hypothesis import strategies as st

from kvframe import Policy, StepInputs, TopBudget, Trigger
from kvframe.registry import PolicyRecord
from kvframe.testing.cases import Case, assert_close, attended, make_call, make_layout
from kvframe.testing.models import play_model, play_stock, tiny_llama
from kvframe.testing.reference import causal_attention_over
from kvframe.testing.small import small_policy
from kvframe.testing.strategies import cases, compositions, variants

BEYOND = TopBudget(token_budget=400)


def fires_at_first(trigger: Trigger) -> bool:
    """Whether the first step after a prompt selects."""
    layout = make_layout()
    query, state = torch.ones(2, 4, 8, dtype=torch.float64), trigger.init(layout)
    trigger.begin(query, state)
    inputs = StepInputs(query=query, layout=layout, token_ids=torch.zeros(2, dtype=torch.int64), board={})
    return bool(trigger.step(inputs, state).due.all())


@pytest.mark.parametrize("execution", ["dense", "offload"])
@given(policy=compositions(plain=True), case=cases(max_prompt=40))
def test_layer(execution: str, policy: Policy, case: Case):
    """Any trigger that fires at the first step, with any other stages, attends to everything at every step."""
    assume(fires_at_first(policy.trigger))
    layer = case.layer(policy.swap(selector=BEYOND), execution)
    text = case.text(layer.layout)
    expected = causal_attention_over(text, case, layer.layout)
    for call in case.calls():
        out = make_call(layer, text, case, call)
        torch.testing.assert_close(out, expected[:, :, call.start : call.stop], atol=1e-10, rtol=1e-10)
        if not call.is_prompt:
            everything = [[list(range(call.stop - num))] * case.num_kv_heads for num in case.padding]
            assert attended(layer) == everything


@pytest.mark.parametrize("execution", ["dense", "offload"])
@given(policy=compositions(plain=True), case=cases(max_prompt=40))
def test_prompts_are_attended_in_full(execution: str, policy: Policy, case: Case):
    """Whatever the policy and its budget, a prompt's and a later turn's tokens see all tokens before them."""
    layer = case.layer(policy, execution)
    text = case.text(layer.layout)
    expected = causal_attention_over(text, case, layer.layout)
    for call in case.calls():
        out = make_call(layer, text, case, call)
        if call.is_prompt:
            torch.testing.assert_close(out, expected[:, :, call.start : call.stop], atol=1e-10, rtol=1e-10)


def selecting_policies() -> list[PolicyRecord]:
    """Registered policies with a budget and a trigger that fires at the first step."""
    policies = [(record, small_policy(record)) for record in policy_records()]
    return [
        record
        for record, policy in policies
        if isinstance(policy.selector, TopBudget) and fires_at_first(policy.trigger)
    ]


@given(
    record=st.sampled_from(selecting_policies()),
    data=st.data(),
    case=cases(max_turns=2, max_prompt=40, max_steps=8),
    num_kv_heads=st.sampled_from([1, 2, 4]),
)
def test_model(record: PolicyRecord, data: st.DataObject, case: Case, num_kv_heads: int):
    """A model's logits are those of its own full attention, through chunks, turns and left padding."""
    policy = data.draw(variants(record, ((), (0,)))).swap(selector=BEYOND)
    model = tiny_llama(num_kv_heads=num_kv_heads)
    trace = play_model(model, policy, case, "offload")

    assert_close(play_stock(model, case), trace.logits, 1e-8)
