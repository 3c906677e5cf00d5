"""One policy, two executions: `dense` keeps everything on the device under a mask, `offload` moves rows."""

import torch
from helpers import policy_records
from hypothesis import given
from hypothesis import strategies as st

from kvframe import Policy
from kvframe.registry import PolicyRecord
from kvframe.testing.cases import Case, assert_close, assert_equal_traces, play
from kvframe.testing.models import ModelTrace, play_model, tiny_llama
from kvframe.testing.strategies import cases, compositions, examples, variants
from kvframe.testing.tape import Tape

# One test for all of them; `test_conformance.py` has one for each.
any_policy = st.sampled_from(policy_records())


def compare_layers(policy: Policy, case: Case) -> None:
    """The same positions and outputs in both executions of one layer."""
    layout = case.layout()
    text = case.text(layout)
    dense, offload = (play(case.layer(policy, execution), text, case) for execution in ("dense", "offload"))

    assert_equal_traces(dense, offload, 1e-10)


@examples(3)
@given(policy=compositions(), case=cases())
def test_layer_of_any_composition(policy: Policy, case: Case):
    """LouisKV with any stage of any slot swapped attends to the same positions of a layer in both executions, in
    float64."""
    compare_layers(policy, case)


def model_cases() -> st.SearchStrategy[Case]:
    """Cases that are small enough for a model."""
    return cases(max_turns=2, max_prompt=40, max_steps=8)


models = st.fixed_dictionaries(
    {
        "num_layers": st.sampled_from([2, 3]),
        "num_kv_heads": st.sampled_from([2, 4]),
        "head_dim": st.sampled_from([4, 16]),
    }
)
DENSE_LAYERS = ((), (0,), (1,))


def compare_models(expected: ModelTrace, actual: ModelTrace, tolerance: float) -> None:
    """The same positions in every layer at every step, and the same logits but for rounding."""
    assert expected.attended == actual.attended
    assert_close(expected.logits, actual.logits, tolerance)


@given(record=any_policy, data=st.data(), case=model_cases(), model=models)
def test_model(record: PolicyRecord, data: st.DataObject, case: Case, model: dict[str, int]):
    """A registered policy, with dense layers or without, gives a model the same logits and attended positions in both
    executions, in float64."""
    policy, llama = data.draw(variants(record, DENSE_LAYERS)), tiny_llama(**model)
    dense, offload = (play_model(llama, policy, case, execution) for execution in ("dense", "offload"))

    compare_models(dense, offload, 1e-8)


@given(record=any_policy, data=st.data(), case=model_cases(), model=models)
def test_model_in_float32(record: PolicyRecord, data: st.DataObject, case: Case, model: dict[str, int]):
    """In float32 the logits agree where `dense` takes the decisions that `offload` took."""
    policy, llama = data.draw(variants(record, DENSE_LAYERS)), tiny_llama(**model, dtype=torch.float32)
    tape = Tape()
    taped = tape.wrap(policy)
    offload = play_model(llama, taped, case, "offload")
    tape.playing = True
    dense = play_model(llama, taped, case, "dense")

    assert not tape.decisions
    compare_models(dense, offload, 1e-4)
