"""What policies promise, of compositions that no plugin brings; `test_conformance.py` has those that are registered."""

import pytest
import torch
from helpers import policy_records, record_id
from hypothesis import given
from hypothesis import strategies as st

import kvframe
from kvframe import Invariant, Policy, TopBudget
from kvframe.registry import PolicyRecord
from kvframe.testing.cases import Case
from kvframe.testing.invariants import PROPERTIES
from kvframe.testing.models import tiny_llama
from kvframe.testing.small import small_policy
from kvframe.testing.strategies import cases, compositions
from kvframe.types import Execution

EXECUTIONS: tuple[Execution, ...] = ("dense", "offload")


def test_every_invariant_has_a_property():
    """Nothing can be promised that is not tested."""
    assert PROPERTIES.keys() == set(Invariant)


@pytest.mark.parametrize("record", policy_records(), ids=record_id)
def test_fixed_budgets_promise_everything(record: PolicyRecord):
    """LouisKV and every other policy that selects by a fixed budget and keeps the rest waive nothing."""
    policy = small_policy(record)
    if isinstance(policy.selector, TopBudget) and not policy.transfer.drops:
        assert policy.promises == tuple(Invariant)


@pytest.mark.parametrize("invariant", Invariant, ids=lambda invariant: invariant.name.lower())
@given(policy=compositions(), case=cases(), execution=st.sampled_from(EXECUTIONS))
def test_promise_of_any_composition(invariant: Invariant, policy: Policy, case: Case, execution: Execution):
    """LouisKV with other stages, and with a trigger whose heads decide on their own, keeps what it promises, at every
    step and in both executions; bytes move in one of them alone."""
    if invariant in policy.promises:
        PROPERTIES[invariant](policy, case, execution)


every_policy = pytest.mark.parametrize("record", policy_records(), ids=record_id)


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
