"""The semantic trigger: r_t < tau, per layer or per KV head, before or after RoPE."""

import math

import pytest
import torch
from helpers import cosine
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvframe import LayerLayout, StepInputs
from kvframe.errors import ConfigError
from kvframe.testing.cases import make_layout, make_text, turn
from kvframe_louis import SemanticTrigger


def due_steps(trigger: SemanticTrigger, layout: LayerLayout, queries: list[Tensor], first: int = 1) -> list[Tensor]:
    """Decisions for queries [B, Hq, D] from number `first` on; the one before it ended the prompt."""
    state = trigger.init(layout)
    trigger.begin(queries[first - 1], state)
    return [trigger.step(StepInputs(query=query, layout=layout), state).due.clone() for query in queries[first:]]


def some_queries(layout: LayerLayout, count: int, seed: int) -> list[Tensor]:
    """Queries that stay about the same for a few tokens, then change."""
    return list(make_text(layout, count, seed).query.unbind(2))


@given(
    tau=st.floats(-1, 1),
    heads=st.sampled_from(["layer", "kv-head"]),
    group_size=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_definition(tau: float, heads: str, group_size: int, seed: int):
    """After the first step a selection is due where the mean cosine to the step before is below tau."""
    layout = make_layout(batch_size=2, num_kv_heads=2, group_size=group_size, head_dim=5)
    queries = some_queries(layout, 12, seed)
    due = due_steps(SemanticTrigger(tau=tau, heads=heads), layout, queries)

    assert due[0].all()
    for step, flags in enumerate(due[1:], start=2):
        for batch in range(2):
            pairs = zip(queries[step - 1][batch].tolist(), queries[step][batch].tolist(), strict=True)
            cosines = [cosine(*pair) for pair in pairs]
            for head in range(2):
                own = cosines[head * group_size : (head + 1) * group_size] if heads == "kv-head" else cosines
                assert bool(flags[batch, head]) == (sum(own) / len(own) < tau)


def test_heads_decide_apart():
    """With heads='kv-head' one head that turns away fires alone; as a layer both or neither do."""
    layout = make_layout(batch_size=1, num_kv_heads=2, group_size=1, head_dim=2)
    still = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    turned = torch.tensor([[[1.0, 0.0], [-1.0, 0.1]]], dtype=torch.float64)

    def second(**options: object) -> list[bool]:
        return due_steps(SemanticTrigger(tau=0.5, **options), layout, [still, still, turned])[1][0].tolist()

    assert second(heads="kv-head") == [False, True]
    assert second(heads="layer") == [True, True]


@given(tau=st.sampled_from([-1.0, -1, -2.5]), seed=st.integers(0, 2**16))
def test_low_tau_leaves_the_first_step(tau: float, seed: int):
    """tau = -1 fires at the first step alone, though the queries turn round."""
    layout = make_layout()
    queries = some_queries(layout, 9, seed)
    due = due_steps(SemanticTrigger(tau=tau), layout, [*queries, -queries[-1]])

    assert [bool(flags.all()) for flags in due] == [True] + [False] * 8
    assert not any(bool(flags.any()) for flags in due[1:])


@given(tau=st.sampled_from([1.001, 2, 1.5]), seed=st.integers(0, 2**16))
def test_high_tau_takes_every_step(tau: float, seed: int):
    """tau > 1 fires at every step, though the query does not change at all."""
    layout = make_layout()
    query = some_queries(layout, 1, seed)[0]

    assert all(bool(flags.all()) for flags in due_steps(SemanticTrigger(tau=tau), layout, [query] * 9))


def test_first_step_after_a_turn():
    """A turn's text starts anew: its first step is due, and the ones behind it compare with their own predecessor."""
    layout = make_layout()
    query = some_queries(layout, 1, 0)[0]
    trigger = SemanticTrigger(tau=0.5)
    state = trigger.init(layout)

    def step(sign: float) -> bool:
        return bool(trigger.step(StepInputs(query=sign * query, layout=layout), state).due.all())

    trigger.begin(query, state)
    assert [step(1), step(1), step(-1), step(-1)] == [True, False, True, False]
    trigger.begin(query, state)
    assert [step(1), step(1), step(-1)] == [True, False, True]


def test_queries_are_kept_by_value():
    """The query of the step before is remembered, though its tensor is written over."""
    layout = make_layout()
    query = some_queries(layout, 1, 0)[0]
    trigger, buffer = SemanticTrigger(tau=0.5), query.clone()
    state = trigger.init(layout)
    trigger.begin(buffer, state)
    inputs = StepInputs(query=buffer, layout=layout)
    trigger.step(inputs, state)
    buffer.neg_()

    assert bool(trigger.step(inputs, state).due.all())


@given(tau=st.floats(-0.9, 0.99), seed=st.integers(0, 2**16))
def test_before_rope(tau: float, seed: int):
    """With rope='before' the trigger decides as on the queries before they were turned to their positions."""
    layout = make_layout(head_dim=4)
    plain = some_queries(layout, 10, seed)
    turned = [turn(query, 100 + position) for position, query in enumerate(plain)]
    expected = due_steps(SemanticTrigger(tau=tau), layout, plain)
    before = due_steps(SemanticTrigger(tau=tau, rope="before"), layout, turned)

    assert [flags.tolist() for flags in before] == [flags.tolist() for flags in expected]


def test_after_rope_sees_the_turn():
    """A query that stays the same, turned from step to step, fires after RoPE and does not before it."""
    layout = make_layout(batch_size=1, num_kv_heads=1, group_size=1, head_dim=2)
    query = torch.ones(1, 1, 2, dtype=torch.float64)
    turned = [turn(query, position) for position in range(6)]
    tau = (math.cos(0.5) + 1) / 2

    after = due_steps(SemanticTrigger(tau=tau), layout, turned)
    before = due_steps(SemanticTrigger(tau=tau, rope="before"), layout, turned)
    assert [bool(flags) for flags in after] == [True] * 5
    assert [bool(flags) for flags in before] == [True] + [False] * 4


def test_a_tau_for_every_layer():
    """Each layer of the model has its own threshold."""
    query = some_queries(make_layout(), 1, 0)[0]
    trigger = SemanticTrigger(tau=[-1.0, 2.0, 0.5])
    fired = []
    for layer_idx in range(3):
        layout = make_layout(layer_idx=layer_idx, num_layers=3)
        due = due_steps(trigger, layout, [query, query, query, -query])
        fired.append([bool(flags.all()) for flags in due])

    assert trigger.tau == (-1.0, 2.0, 0.5)
    assert fired == [[True, False, False], [True, True, True], [True, False, True]]


@pytest.mark.parametrize("num_layers", [1, 3])
def test_tau_for_another_model(num_layers: int):
    """A tuple that does not have a value for every layer is refused with both numbers."""
    with pytest.raises(ConfigError, match=rf"tau has 2 values, the model has {num_layers} layers"):
        SemanticTrigger(tau=(0.5, 0.7)).init(make_layout(num_layers=num_layers))


def test_before_rope_needs_a_rotation():
    """A model whose rotation is not known is refused, and after RoPE is named as the way out."""
    with pytest.raises(ConfigError, match="use rope='after'"):
        SemanticTrigger(rope="before").init(make_layout(rotate=None))


@pytest.mark.parametrize("tau", [float("nan"), float("inf"), "0.7", None, True, (), (0.5, None), (float("nan"),)])
def test_tau_that_is_none(tau: object):
    """A threshold is a finite number, or one for every layer."""
    with pytest.raises(ConfigError, match=r"SemanticTrigger\.tau must be a"):
        SemanticTrigger(tau=tau)


@pytest.mark.parametrize("options", [{"rope": "none"}, {"rope": True}, {"heads": "qo-head"}])
def test_options_that_are_none(options: dict[str, object]):
    """Anything but the choices is refused."""
    (name,) = options
    with pytest.raises(ConfigError, match=rf"SemanticTrigger\.{name} must be one of"):
        SemanticTrigger(**options)
