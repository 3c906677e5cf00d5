"""What policies promise, as properties: one for every `Invariant`, for every registered policy that declares it."""

from typing import Any

import pytest
import torch
from helpers import policy_records, record_id
from hypothesis import assume, given
from hypothesis import strategies as st

import kvframe
from kvframe import Invariant, Policy, TopBudget
from kvframe.registry import PolicyRecord
from kvframe.testing.cases import Case, Turn, assert_close
from kvframe.testing.invariants import PROPERTIES
from kvframe.testing.models import model_inputs, play_model, tiny_llama
from kvframe.testing.small import small_policy
from kvframe.testing.strategies import cases, compositions, examples, variants

EXECUTIONS = ("dense", "offload")


def promises() -> list[Any]:
    """Every policy with every invariant that it promises."""
    return [
        pytest.param(record, invariant, id=f"{record.name}-{invariant.name.lower()}")
        for record in policy_records()
        for invariant in small_policy(record).promises
    ]


def test_every_invariant_has_a_property():
    """Nothing can be promised that is not tested."""
    assert PROPERTIES.keys() == set(Invariant)


@pytest.mark.parametrize("record", policy_records(), ids=record_id)
def test_fixed_budgets_promise_everything(record: PolicyRecord):
    """LouisKV and every other policy that selects by a fixed budget and keeps the rest waive nothing."""
    policy = small_policy(record)
    if isinstance(policy.selector, TopBudget) and not policy.transfer.drops:
        assert policy.promises == tuple(Invariant)


@pytest.mark.parametrize("record, invariant", promises())
@examples(0.4)
@given(data=st.data(), case=cases(), execution=st.sampled_from(EXECUTIONS))
def test_promise(record: PolicyRecord, invariant: Invariant, data: st.DataObject, case: Case, execution: str):
    """A policy keeps what it promises, at every step and in both executions; bytes move in one of them alone."""
    policy = data.draw(variants(record))
    PROPERTIES[invariant](policy, case, execution)


@pytest.mark.parametrize("invariant", Invariant, ids=lambda invariant: invariant.name.lower())
@given(policy=compositions(), case=cases(), execution=st.sampled_from(EXECUTIONS))
def test_promise_of_any_composition(invariant: Invariant, policy: Policy, case: Case, execution: str):
    """So do compositions of other stages, and of a trigger whose heads decide on their own."""
    assume(invariant in policy.promises)
    PROPERTIES[invariant](policy, case, execution)


every_policy = pytest.mark.parametrize("record", policy_records(), ids=record_id)


@every_policy
def test_rows_of_a_model_are_independent(record: PolicyRecord):
    """Logits and positions of a row are the same alone and in a batch with padding, through a whole model."""
    turns = (Turn(chunks=(20, 14), num_steps=8), Turn(chunks=(9,), num_steps=4))
    case = Case(batch_size=3, padding=(5, 0, 19), turns=turns)
    policy, model, inputs = small_policy(record), tiny_llama(), model_inputs(case)
    together = play_model(model, policy, case, "offload", inputs)
    for batch, padding in enumerate(case.padding):
        alone = play_model(model, policy, case.alone(batch), "offload", inputs.row(batch, padding))
        assert alone.attended == [[[layer[batch]] for layer in layers] for layers in together.attended]
        own = torch.cat(together.logits, 1)[batch : batch + 1, padding:]
        assert_close([torch.cat(alone.logits, 1)], [own], 1e-8)


@every_policy
@torch.no_grad()
def test_generate_on_a_reset_cache(record: PolicyRecord):
    """A second `generate` on a reset cache gives the same tokens and scores, bit by bit, and the same report."""
    model, generator = tiny_llama(), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (2, 30), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
        "pad_token_id": 0,
    }
    with kvframe.attach(model, small_policy(record)) as run:
        first = model.generate(ids, attention_mask=mask, **options)
        counted = run.report()
        cache = run.cache
        cache.reset()
        model.generate(ids.flip(1), past_key_values=cache, **options)
        cache.reset()
        second = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)

    assert run.cache is cache
    assert torch.equal(first.sequences, second.sequences)
    assert all(torch.equal(one, other) for one, other in zip(first.scores, second.scores))
    assert cache.report().layers == counted.layers
