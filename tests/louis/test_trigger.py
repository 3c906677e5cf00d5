"""The semantic trigger: r_t < tau, per layer or per KV head, before or after RoPE; and what guards it."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import cosine
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvframe import LayerLayout, StepInputs
from kvframe.errors import ConfigError
from kvframe.testing.cases import make_layout, make_text, turn
from kvframe_louis import SegmentUnits, SemanticTrigger


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


# ---- what is ours ---------------------------------------------------------------------------------------------------

OPTIONS = {
    "tau": st.floats(-1, 1),
    "heads": st.sampled_from(["layer", "kv-head"]),
    "anchor": st.none() | st.floats(-1, 1),
    "hysteresis": st.none() | st.floats(0, 1),
}


def decide(trigger: SemanticTrigger, layout: LayerLayout, queries: list[Tensor]) -> tuple[Tensor, Tensor]:
    """For queries [B, Hq, D] behind the first, which ends a prompt: which heads start to use a new selection at each of
    these steps, and which selected with the query of that step, bool [steps, B, H] both."""
    state = trigger.init(layout)
    trigger.begin(queries[0], state)
    used, selected, pending = [], [], torch.zeros(layout.batch_size, layout.num_kv_heads, dtype=torch.bool)
    for query in queries[1:]:
        decision = trigger.step(StepInputs(query=query, layout=layout), state)
        ahead = torch.zeros_like(pending) if decision.ahead is None else decision.ahead.clone()
        used.append(decision.due | pending)
        selected.append(decision.due | ahead)
        pending = ahead
    return torch.stack(used), torch.stack(selected)


@given(
    options=st.fixed_dictionaries(OPTIONS), max_age=st.integers(1, 8), ahead=st.booleans(), seed=st.integers(0, 2**16)
)
def test_no_selection_is_older_than_max_age(options: dict[str, object], max_age: int, ahead: bool, seed: int):
    """No head goes more than `max_age` steps from one selection that it uses to the next, whatever else is set."""
    layout = make_layout()
    trigger = SemanticTrigger(max_age=max_age, ahead=ahead, **options)
    used, _ = decide(trigger, layout, some_queries(layout, 30, seed))

    for flags in used.flatten(1).T:
        steps = [*flags.nonzero()[:, 0].tolist(), len(flags)]
        assert steps[0] == 0
        assert all(later - earlier <= max_age for earlier, later in pairwise(steps))


@given(max_age=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_max_age_alone(max_age: int, seed: int):
    """Where tau never fires, every `max_age`-th step is due, and no other."""
    layout = make_layout()
    used, _ = decide(SemanticTrigger(tau=-1.0, max_age=max_age), layout, some_queries(layout, 20, seed))

    assert [bool(flags.all()) for flags in used] == [step % max_age == 0 for step in range(19)]
    assert torch.equal(used.any(-1), used.all(-1))


@given(
    options=st.fixed_dictionaries({**OPTIONS, "anchor": st.floats(-1, 1)}),
    ahead=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_anchor_bounds_drift(options: dict[str, object], ahead: bool, seed: int):
    """Whoever did not select in a step is still near the query of its last selection, both before RoPE."""
    layout = make_layout(head_dim=4)
    plain = some_queries(layout, 20, seed)
    turned = [turn(query, 100 + position) for position, query in enumerate(plain)]
    trigger = SemanticTrigger(ahead=ahead, **options)
    _, selected = decide(trigger, layout, turned)
    groups = range(layout.num_kv_heads)
    for batch in range(layout.batch_size):
        for head in groups:
            last = 0
            for step, query in enumerate(plain[1:]):
                if selected[step, batch, head]:
                    last = step
                    continue
                own = slice(None) if trigger.heads == "layer" else slice(head * 2, head * 2 + 2)
                pairs = zip(plain[1 + last][batch, own].tolist(), query[batch, own].tolist(), strict=True)
                cosines = [cosine(*pair) for pair in pairs]
                # The trigger turns its anchor step by step, which rounds.
                assert sum(cosines) / len(cosines) >= trigger.anchor - 1e-9


def test_slow_drift():
    """A query that turns a little at every step never fires by tau, and by the anchor once it has turned enough."""
    layout = make_layout(batch_size=1, num_kv_heads=1, group_size=1, head_dim=4)
    angles = [math.radians(10 * step) for step in range(19)]
    plain = [torch.tensor([[[0, 0, math.cos(angle), math.sin(angle)]]], dtype=torch.float64) for angle in angles]
    queries = [turn(query, position) for position, query in enumerate(plain)]
    threshold = math.cos(math.radians(35))

    def fired(**options: float) -> list[int]:
        _, selected = decide(SemanticTrigger(tau=0.9, **options), layout, queries)
        return selected.flatten().nonzero()[:, 0].tolist()

    assert fired() == [0]
    assert fired(anchor=threshold) == [0, 4, 8, 12, 16]


def test_an_outlier_fires_once():
    """With hysteresis; and again once the query has come to rest. Without it fires on the way back as well."""
    layout = make_layout(batch_size=1, num_kv_heads=1, group_size=1, head_dim=2)
    signs = [1, 1, 1, -1, 1, 1, 1, -1, -1, -1]
    queries = [torch.tensor([[[float(sign), 0.0]]], dtype=torch.float64) for sign in signs]

    def fired(**options: float) -> list[int]:
        _, selected = decide(SemanticTrigger(tau=0.5, **options), layout, queries)
        return selected.flatten().nonzero()[:, 0].tolist()

    assert fired() == [0, 2, 3, 6]
    assert fired(hysteresis=0.2) == [0, 2, 6]


@given(options=st.fixed_dictionaries({**OPTIONS, "hysteresis": st.floats(0, 1)}), seed=st.integers(0, 2**16))
def test_between_two_fires_the_query_comes_to_rest(options: dict[str, object], seed: int):
    """With hysteresis there is a similarity of at least tau + hysteresis between two selections by tau."""
    layout = make_layout()
    queries = some_queries(layout, 20, seed)
    trigger = SemanticTrigger(**{**options, "anchor": None})
    _, selected = decide(trigger, layout, queries)
    for batch in range(layout.batch_size):
        for head in range(layout.num_kv_heads):
            own = slice(None) if trigger.heads == "layer" else slice(head * 2, head * 2 + 2)
            rested = True
            for step in range(1, len(selected)):
                pairs = zip(queries[step][batch, own].tolist(), queries[step + 1][batch, own].tolist(), strict=True)
                cosines = [cosine(*pair) for pair in pairs]
                if selected[step, batch, head] and step > 1:
                    assert rested
                if sum(cosines) / len(cosines) >= trigger.tau + trigger.hysteresis:
                    rested = True
                elif selected[step, batch, head]:
                    rested = False


@given(options=st.fixed_dictionaries({"tau": OPTIONS["tau"], "heads": OPTIONS["heads"]}), seed=st.integers(0, 2**16))
def test_ahead_is_a_step_late(options: dict[str, object], seed: int):
    """The same steps fire, their selections are used one step later; the first step selects for itself."""
    layout = make_layout()
    queries = some_queries(layout, 15, seed)
    used, selected = decide(SemanticTrigger(**options), layout, queries)
    used_later, selected_ahead = decide(SemanticTrigger(ahead=True, **options), layout, queries)

    assert torch.equal(used, selected) and torch.equal(selected, selected_ahead)
    assert used_later[0].all() and not used_later[1].any()
    assert torch.equal(used_later[2:], used[1:-1])


def test_segments_end_where_the_text_turns():
    """A segment ends before the token at which the trigger fires, also where the selection comes a step later."""
    layout = make_layout(batch_size=1, num_kv_heads=1, group_size=1, head_dim=2)
    queries = [torch.tensor([[[float(sign), 0.0]]], dtype=torch.float64) for sign in (1, 1, 1, -1, -1)]
    trigger = SemanticTrigger(tau=0.5, ahead=True)
    state = trigger.init(layout)
    trigger.begin(queries[0], state)
    cuts, units = [], SegmentUnits()
    for query in queries[1:]:
        inputs = StepInputs(query=query, layout=layout)
        cuts.append(bool(units.boundary(inputs, trigger.step(inputs, state), None)))

    assert cuts == [True, False, True, False]


def test_anchors_of_a_16_bit_model():
    """Some hundred turns of the anchor, one a step, leave it as near as a single turn of that many positions would."""
    layout = make_layout(batch_size=1, num_kv_heads=1, group_size=1, head_dim=4, dtype=torch.bfloat16)
    query = torch.tensor([[[1.0, 0.5, 0.2, -0.3]]])
    trigger = SemanticTrigger(tau=-1.0, anchor=0.999)
    state = trigger.init(layout)
    trigger.begin(query.bfloat16(), state)
    fired = []
    for position in range(400):
        inputs = StepInputs(query=turn(query, position).bfloat16(), layout=layout)
        fired.append(bool(trigger.step(inputs, state).due))

    assert fired == [True] + [False] * 399


@pytest.mark.parametrize("num_layers", [1, 3])
def test_tau_for_another_model(num_layers: int):
    """A tuple that does not have a value for every layer is refused with both numbers."""
    with pytest.raises(ConfigError, match=rf"tau has 2 values, the model has {num_layers} layers"):
        SemanticTrigger(tau=(0.5, 0.7)).init(make_layout(num_layers=num_layers))


@pytest.mark.parametrize(
    "options, way_out", [({"rope": "before"}, "rope='after'"), ({"anchor": 0.5}, "max_age instead of an anchor")]
)
def test_before_rope_needs_a_rotation(options: dict[str, object], way_out: str):
    """A model whose rotation is not known is refused, and what does without it is named as the way out."""
    with pytest.raises(ConfigError, match=f"use {way_out}"):
        SemanticTrigger(**options).init(make_layout(rotate=None))


@pytest.mark.parametrize("tau", [float("nan"), float("inf"), "0.7", None, True, (), (0.5, None), (float("nan"),)])
def test_tau_that_is_none(tau: object):
    """A threshold is a finite number, or one for every layer."""
    with pytest.raises(ConfigError, match=r"SemanticTrigger\.tau must be a"):
        SemanticTrigger(tau=tau)


@pytest.mark.parametrize("options", [{"rope": "none"}, {"rope": True}, {"heads": "qo-head"}, {"ahead": 1}])
def test_options_that_are_none(options: dict[str, object]):
    """Anything but the choices is refused."""
    (name,) = options
    with pytest.raises(ConfigError, match=rf"SemanticTrigger\.{name} must be one of"):
        SemanticTrigger(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_age": 0},
        {"max_age": 2.5},
        {"hysteresis": -0.1},
        {"hysteresis": float("nan")},
        {"anchor": ()},
        {"anchor": "0"},
    ],
)
def test_guards_that_are_none(options: dict[str, object]):
    """An age is a whole number of steps, an anchor a number for every layer, a hysteresis not below 0."""
    (name,) = options
    with pytest.raises(ConfigError, match=rf"SemanticTrigger\.{name} must be "):
        SemanticTrigger(**options)
