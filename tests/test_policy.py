"""A policy as a value: swapped, compared, shown, and written as plain data."""

import json
from typing import Any

import pytest
from attrs import evolve, fields
from helpers import policy_records, record_id, stage_id
from hypothesis import given
from hypothesis import strategies as st

import kvframe
from kvframe import (
    DecoupledUnits,
    EveryStep,
    FixedStride,
    HostPool,
    Invariant,
    KeepOnDevice,
    MeanKey,
    Never,
    PageUnits,
    Policy,
    SelectNothing,
    TokenUnits,
    TopBudget,
)
from kvframe.errors import ConfigError, SlotError, UnknownNameError
from kvframe.registry import PolicyRecord, default_registry
from kvframe.stages import SLOTS, Stage
from kvframe.testing.small import small_stages
from kvframe.testing.strategies import compositions, variants

every_policy = pytest.mark.parametrize("record", policy_records(), ids=record_id)


def plain(**changes: Any) -> Policy:
    """A policy of the core's own stages."""
    stages = {
        "trigger": EveryStep(),
        "units": TokenUnits(),
        "scorer": MeanKey(),
        "selector": TopBudget(token_budget=8),
        "transfer": HostPool(),
    }
    return Policy(**{**stages, **changes})


class TestSwap:
    """A variant, checked as the policy itself was."""

    def test_one_field_changes(self):
        """The others are the same objects; the original is untouched."""
        policy = plain()
        swapped = policy.swap(trigger=Never(), window_size=3)

        assert (swapped.trigger, swapped.window_size) == (Never(), 3)
        assert all(swapped.stage(slot) is policy.stage(slot) for slot in SLOTS if slot != "trigger")
        assert policy == plain()

    def test_nothing_changes(self):
        """A swap of nothing is the same policy."""
        assert plain().swap() == plain()

    @pytest.mark.parametrize("slot", SLOTS)
    @pytest.mark.parametrize("stage", [each for slot in SLOTS for each in small_stages(slot)[:1]], ids=stage_id)
    def test_slots(self, slot: str, stage: Stage):
        """A stage fits its own slot alone; elsewhere the message names both and the way out."""
        if stage.slot == slot:
            base = plain(selector=TopBudget(), scorer=MeanKey(keep_values=True))
            assert base.swap(**{slot: stage}).stage(slot) is stage
            return
        with pytest.raises(SlotError, match=f"the {slot} slot takes a .*pass it as {stage.slot}="):
            plain().swap(**{slot: stage})
        with pytest.raises(SlotError, match=f"pass it as {stage.slot}="):
            plain(**{slot: stage})

    @pytest.mark.parametrize("value", [None, "every-step", 1, object()])
    def test_what_is_no_stage(self, value: object):
        """Anything else is shown as it came."""
        with pytest.raises(SlotError, match="the trigger slot takes a Trigger, got"):
            plain().swap(trigger=value)

    def test_a_class_is_no_stage(self):
        """The parentheses that are missing are named."""
        with pytest.raises(SlotError, match=r"write EveryStep\(\)"):
            plain().swap(trigger=EveryStep)

    def test_unknown_field(self):
        """What was probably meant is named."""
        with pytest.raises(ConfigError, match=r"a policy has no field 'triger'.*trigger"):
            plain().swap(triger=EveryStep())


class TestSizes:
    """Sizes that cannot work are refused when the policy is made."""

    @pytest.mark.parametrize("value", [-1, 1.5, "4", None, True])
    def test_sinks(self, value: object):
        """There may be no sinks, but not fewer."""
        assert plain(sink_size=0).sink_size == 0
        with pytest.raises(ConfigError, match=r"Policy\.sink_size must be an integer >= 0, got"):
            plain(sink_size=value)

    @pytest.mark.parametrize("value", [0, -1, 1.5, "4", None, True])
    def test_window(self, value: object):
        """The window holds at least the token of the step."""
        assert plain(window_size=1).window_size == 1
        with pytest.raises(ConfigError, match=r"Policy\.window_size must be an integer >= 1, got"):
            plain(window_size=value)

    @given(budget=st.integers(1, 40), page_size=st.integers(1, 40))
    def test_budget_of_less_than_a_unit(self, budget: int, page_size: int):
        """A budget holds one unit at least, whichever of the two is swapped; no budget at all is fine."""
        selector, units = TopBudget(token_budget=budget), PageUnits(page_size=page_size)
        assert plain(selector=SelectNothing(), units=units).selector.capacity == 0
        if budget >= page_size:
            assert plain(selector=selector, units=units).selector.capacity == budget
            return
        for make in (
            lambda: plain(selector=selector, units=units),
            lambda: plain(selector=TopBudget(token_budget=40), units=units).swap(selector=selector),
            lambda: plain(selector=selector).swap(units=units),
        ):
            with pytest.raises(ConfigError, match=f"a budget of {budget} tokens is smaller than one unit"):
                make()

    @every_policy
    @pytest.mark.parametrize("name", ["token_budget", "window_size", "cluster_size"])
    @pytest.mark.parametrize("value", [0, -1])
    def test_options(self, record: PolicyRecord, name: str, value: int):
        """So are they as options of a registered policy."""
        if name in {field.name for field in fields(record.config_cls)}:
            # A policy may pass it on to a stage that calls it otherwise.
            with pytest.raises(ConfigError, match=rf"\w+ must be an integer >= 1, got {value}"):
                kvframe.policy(record.name, **{name: value})
        else:
            with pytest.raises(ConfigError, match=f"has no option '{name}'"):
                kvframe.policy(record.name, **{name: value})


class TestDenseLayers:
    """Which layers keep everything."""

    @pytest.mark.parametrize(
        "given, kept",
        [((0, 1), (0, 1)), ([0, 2], (0, 2)), (range(3), (0, 1, 2)), ((), ()), ([], ()), ("all", "all")],
    )
    def test_forms(self, given: object, kept: object):
        """Layer numbers in a tuple, list or range, or 'all'."""
        policy = plain(dense_layers=given)

        assert policy.dense_layers == kept
        assert [policy.is_dense(layer) for layer in range(4)] == [kept == "all" or layer in kept for layer in range(4)]

    @pytest.mark.parametrize("value", [(-1,), (0.0,), (True,), ("0",), "some", 0, None, {0}, ((0,),)])
    def test_what_is_no_form(self, value: object):
        """Both forms are named."""
        with pytest.raises(ConfigError, match=r"dense_layers must be layer numbers >= 0, as in \(0, 1\), or 'all'"):
            plain(dense_layers=value)


class TestEquality:
    """A policy is its stages and sizes."""

    @given(policy=compositions())
    def test_equal_parts(self, policy: Policy):
        """Policies of equal parts are equal and have one hash."""
        twin = evolve(policy, **{slot: evolve(policy.stage(slot)) for slot in SLOTS})

        assert twin == policy and hash(twin) == hash(policy)
        assert len({policy, twin}) == 1

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "other"},
            {"trigger": FixedStride()},
            {"units": PageUnits(page_size=1)},
            {"scorer": MeanKey(size_term=True)},
            {"selector": TopBudget(token_budget=9)},
            {"transfer": KeepOnDevice()},
            {"sink_size": 1},
            {"window_size": 1},
            {"dense_layers": (0,)},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_each_part_counts(self, change: dict[str, Any]):
        """A policy that differs in one part is another, also to look at."""
        assert plain(**change) != plain()
        assert repr(plain(**change)) != repr(plain())

    def test_immutable(self):
        """Neither policies nor stages can be changed in place."""
        policy = plain()
        for target, name in ((policy, "window_size"), (policy.selector, "token_budget")):
            with pytest.raises(AttributeError):
                setattr(target, name, 1)


class TestShown:
    """Read by people."""

    @every_policy
    def test_repr(self, record: PolicyRecord):
        """Every field by name and value, every stage by its class; no addresses."""
        policy = record.make()
        shown = repr(policy)

        assert shown.startswith(f"Policy(name='{policy.name}'") and " at 0x" not in shown
        for slot in SLOTS:
            stage = policy.stage(slot)
            assert f"{slot}={type(stage).__name__}(" in shown
            for field in fields(type(stage)):
                assert f"{field.name}={getattr(stage, field.name)!r}" in shown
        for name in ("sink_size", "window_size", "dense_layers"):
            assert f"{name}={getattr(policy, name)!r}" in shown

    @every_policy
    def test_str(self, record: PolicyRecord):
        """One line for the sizes, one for each slot, one for the dense layers."""
        policy = record.make()
        first, *slots, last = str(policy).splitlines()

        assert all(str(n) in first for n in (policy.sink_size, policy.selector.capacity, policy.window_size))
        assert [line.split()[0] for line in slots] == list(SLOTS)
        assert all(repr(policy.stage(slot)) in line for slot, line in zip(SLOTS, slots))
        assert last.startswith("  dense layers:")


def is_plain(value: Any) -> bool:
    """Whether a value consists of JSON's own kinds alone."""
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


class TestPlainData:
    """`to_dict` and `from_dict`."""

    @every_policy
    def test_registered_policies(self, record: PolicyRecord):
        """Each goes through JSON and comes back equal."""
        policy = record.make()

        assert is_plain(policy.to_dict())
        assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy

    @every_policy
    @given(data=st.data())
    def test_their_variants(self, record: PolicyRecord, data: st.DataObject):
        """So does each with other options."""
        policy = data.draw(variants(record, ((), (0, 3), "all")))

        assert Policy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy

    @given(policy=compositions(registered=True))
    def test_any_composition(self, policy: Policy):
        """And with any stage in any slot, stages within stages included."""
        data = policy.to_dict()

        assert is_plain(data)
        assert all(data[slot]["stage"] == policy.stage(slot).name for slot in SLOTS)
        assert Policy.from_dict(json.loads(json.dumps(data))) == policy

    def test_a_tau_for_every_layer(self):
        """A tuple becomes a list and a tuple again."""
        policy = kvframe.policy("louiskv", tau=(0.5, 0.25, -1.0))

        assert policy.to_dict()["trigger"]["tau"] == [0.5, 0.25, -1.0]
        assert Policy.from_dict(policy.to_dict()) == policy

    def test_defaults(self):
        """What is left out has its default."""
        data = {slot: {"stage": plain().stage(slot).name} for slot in SLOTS}

        assert Policy.from_dict(data) == plain(selector=TopBudget())

    def test_the_data_is_left_alone(self):
        """Reading it twice gives the same policy twice."""
        data = plain(units=DecoupledUnits(prompt=TokenUnits(), output=PageUnits(page_size=3))).to_dict()
        before = json.dumps(data)

        assert Policy.from_dict(data) == Policy.from_dict(data)
        assert json.dumps(data) == before

    @pytest.mark.parametrize("slot", SLOTS)
    def test_missing_slot(self, slot: str):
        """The slot that is empty is named."""
        data = plain().to_dict()
        del data[slot]
        with pytest.raises(ConfigError, match=f"nothing was given for: {slot}"):
            Policy.from_dict(data)

    def test_unknown_field(self):
        """What was probably meant is named."""
        with pytest.raises(ConfigError, match=r"no field 'sinks'.*sink_size"):
            Policy.from_dict({**plain().to_dict(), "sinks": 3})

    def test_unknown_option_of_a_stage(self):
        """What was probably meant is named."""
        data = plain().to_dict()
        data["selector"]["token_budgt"] = 3
        with pytest.raises(ConfigError, match=r"TopBudget has no option 'token_budgt'.*token_budget"):
            Policy.from_dict(data)

    def test_unknown_stage(self):
        """What was probably meant is named."""
        data = plain().to_dict()
        data["trigger"]["stage"] = "every-stop"
        with pytest.raises(UnknownNameError, match=r"no trigger named 'every-stop'.*every-step"):
            Policy.from_dict(data)

    def test_stage_without_a_name(self):
        """The key that is missing is named."""
        with pytest.raises(ConfigError, match="trigger: expected a mapping with the key 'stage'"):
            Policy.from_dict({**plain().to_dict(), "trigger": {"slot": "trigger"}})

    @pytest.mark.parametrize("value", ["every-step", None, 3, ["every-step"]])
    def test_slot_that_holds_no_mapping(self, value: object):
        """What came is shown."""
        with pytest.raises(SlotError, match="the trigger slot takes a Trigger, got"):
            Policy.from_dict({**plain().to_dict(), "trigger": value})

    def test_stage_of_another_slot(self):
        """A stage that says it belongs elsewhere is refused as in Python."""
        data = plain().to_dict()
        data["trigger"] = data["scorer"]
        with pytest.raises(SlotError, match="pass it as scorer="):
            Policy.from_dict(data)

    def test_sizes_are_checked(self):
        """Plain data is no way round the checks."""
        with pytest.raises(ConfigError, match="window_size must be an integer >= 1, got 0"):
            Policy.from_dict({**plain().to_dict(), "window_size": 0})


class Careless(Never):
    """A trigger that does not keep two promises."""

    name = "careless"
    waives = frozenset({Invariant.RESET_REPEATS, Invariant.EXACT_BUDGET})


def test_promises():
    """A policy promises every invariant but those that one of its stages waives, in their own order."""
    kept = tuple(each for each in Invariant if each not in Careless.waives)

    assert plain().promises == tuple(Invariant)
    assert plain(trigger=Careless()).promises == kept


def test_unknown_policy():
    """What was probably meant is named."""
    with pytest.raises(UnknownNameError, match=r"no policy named 'louis-kv'.*louiskv"):
        kvframe.policy("louis-kv")


def test_options_reach_the_stages():
    """Options of LouisKV land in the stages they belong to."""
    policy = kvframe.policy("louiskv", token_budget=77, tau=0.25, cluster_size=5, min_segment=3, window_size=40)

    assert policy.selector == TopBudget(token_budget=77)
    assert policy.trigger == default_registry().make_stage("trigger", "semantic", tau=0.25)
    assert isinstance(policy.units, DecoupledUnits)
    assert (policy.units.unit_size, policy.units.min_size, policy.units.max_size) == (5, 3, 20)
    assert policy.window_size == 40


@pytest.mark.parametrize(
    "name, sinks, window, tau, budget",
    [
        ("louiskv-long-input", 32, 512, 0.85, 512),
        ("louiskv-long-output", 500, 128, 0.7, 1024),
        ("louiskv-long-both", 64, 256, 0.7, 1024),
    ],
)
def test_published_settings(name: str, sinks: int, window: int, tau: float, budget: int):
    """The paper's three scenarios; segments are at most half the window, and at most 64 tokens."""
    policy = kvframe.policy(name)

    assert (policy.name, policy.sink_size, policy.window_size) == (name, sinks, window)
    assert (policy.trigger.tau, policy.selector.capacity, policy.units.unit_size) == (tau, budget, 16)
    assert (policy.units.min_size, policy.units.max_size) == (4, 64)
    assert policy.dense_layers == (0, 1)
