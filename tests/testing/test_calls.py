"""The calls of the conformance kit: what they take, what they return, and what they refuse."""

import subprocess
import sys
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from attrs import frozen
from hypothesis import strategies as st
from testing.broken_stages import Counting, CountState, OneForAll
from torch import Tensor

import kvframe
from kvframe import Decision, PolicySpec, StageSpec, StepInputs, hookimpl
from kvframe.errors import ConfigError, UnknownNameError
from kvframe.plugins import create_plugin_manager
from kvframe.registry import Registry
from kvframe.testing import Case, ConformanceError, Turn, check_plugin, check_policy, check_stage
from kvframe_kernels.slot_attention import slot_attention


@frozen(kw_only=True)
class Patient(Counting):
    """A sound trigger with an option that the kit does not know."""

    name: ClassVar[str] = "patient"
    patience: int = 100


@frozen(kw_only=True)
class PatientConfig:
    """Pages at a patient trigger's steps."""

    patience: int = 100
    token_budget: int = 64


def build_patient(config: PatientConfig) -> kvframe.Policy:
    """The policy that a config stands for."""
    return kvframe.Policy(
        name="patient",
        trigger=Patient(patience=config.patience),
        units=kvframe.PageUnits(page_size=2),
        scorer=kvframe.MeanKey(),
        selector=kvframe.TopBudget(token_budget=config.token_budget),
        transfer=kvframe.HostPool(),
        sink_size=2,
        window_size=4,
    )


def registry(*stages: type[kvframe.Trigger], name: str = "patient-plugin") -> Registry:
    """The installed plugins and one with a policy and these stages."""
    module = ModuleType(name)
    policy = PolicySpec(name="patient", config_cls=PatientConfig, build=build_patient)
    vars(module).update(
        KVFRAME_API_VERSION=1,
        kvframe_stages=hookimpl(lambda: [StageSpec(stage) for stage in stages]),
        kvframe_policies=hookimpl(lambda: [policy]),
    )
    return Registry(create_plugin_manager([module]))


def test_summary_says_what_was_checked() -> None:
    """Each promise with its examples, and the options that were left alone."""
    summary = check_policy("patient", registry=registry(Patient), only=["contract", "capturable"], max_examples=3)

    assert str(summary) == (
        "policy 'patient'\n"
        "  contract                   kept in 3 examples\n"
        "  capturable                 kept in 3 examples\n"
        "  left at their defaults: patience; options={name: strategy} varies them"
    )


def test_strategies_of_the_author_come_first() -> None:
    """For options that the kit does not know, and for those that it does."""
    seen = set()

    @frozen(kw_only=True)
    class Watched(Patient):
        def __attrs_post_init__(self) -> None:
            seen.add(self.patience)

    summary = check_stage(Watched, options={"patience": st.just(7)}, only=["contract"], max_examples=3)

    assert seen == {7} and summary.undrawn == ()


def test_waived_promises_are_not_checked() -> None:
    """The summary says so."""

    @frozen(kw_only=True)
    class Waiving(Patient):
        waives: ClassVar[frozenset[kvframe.Invariant]] = frozenset({kvframe.Invariant.EXACT_BUDGET})

    (outcome,) = check_stage(Waiving, only=["exact-budget"], max_examples=3).outcomes

    assert outcome.examples == 0 and "not promised" in str(outcome)


def test_plugin_has_all_its_stages_and_policies_checked() -> None:
    """With strategies for options that only some of them have."""
    summaries = check_plugin(
        "patient-plugin", options={"patience": st.integers(1, 3)}, registry=registry(Patient), max_examples=1
    )

    assert [summary.subject for summary in summaries] == ["policy 'patient'", "trigger Patient"]


def test_plugin_with_a_broken_stage() -> None:
    """Its other parts are checked all the same."""
    with pytest.raises(ConformanceError, match=r"^plugin 'patient-plugin' does not keep") as raised:
        check_plugin("patient-plugin", registry=registry(Patient, OneForAll), max_examples=1)

    assert [failure.promise.name for failure in raised.value.failures] == ["contract"]


def test_attention_kernels_of_a_plugin() -> None:
    """They are held to kvframe's own: what gives half of the output is no attention."""
    module = ModuleType("halving-kernels")

    def halved(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out, lse = slot_attention(query, *args, **kwargs)
        return out / 2, lse

    vars(module).update(KVFRAME_API_VERSION=1, kvframe_attention_backend=hookimpl(lambda layout: halved))
    halving = Registry(create_plugin_manager([module]))
    with pytest.raises(ConformanceError, match=r"logits of call \d: dense and offload differ"):
        check_policy("window", registry=halving, only=["same-executions-in-a-model"], max_examples=4)


def test_plugin_that_refuses_every_policy() -> None:
    """Nothing was run, so nothing was kept."""
    module = ModuleType("strict")
    vars(module).update(KVFRAME_API_VERSION=1, kvframe_check_policy=hookimpl(lambda policy: ["not on my watch"]))
    strict = Registry(create_plugin_manager([module]))
    with pytest.raises(ConfigError, match=r"none of \d+ drawn compositions was accepted.*not on my watch"):
        check_policy("window", registry=strict, only=["same-executions-in-a-model"], max_examples=4)


def test_stage_of_a_registered_policy_has_to_be_registered() -> None:
    """Without, a policy that was written down could not be made again."""
    with pytest.raises(ConformanceError, match="UnknownNameError: no trigger named 'patient'"):
        check_policy("patient", registry=registry(), only=["plain-data"], max_examples=1)


def test_what_is_not_deterministic() -> None:
    """A failure that comes and goes is told as one."""
    calls = []

    @frozen(kw_only=True)
    class Erratic(Counting):
        def step(self, inputs: StepInputs, state: CountState) -> Decision:
            calls.append(1)
            if len(calls) == 9:
                raise RuntimeError("the ninth")
            return super().step(inputs, state)

    with pytest.raises(ConformanceError, match=r"RuntimeError: the ninth .*something in it is not deterministic"):
        check_stage(Erratic, only=["same-executions"], max_examples=10)


def test_randomness_is_seen() -> None:
    """A stage that draws from torch's generator gives a second run another result."""

    @frozen(kw_only=True)
    class Random(Counting):
        def step(self, inputs: StepInputs, state: CountState) -> Decision:
            return Decision(due=torch.rand(state.steps.shape) < 0.5)

    with torch.random.fork_rng(devices=[]), pytest.raises(ConformanceError, match="reset-repeats"):
        check_stage(Random, only=["reset-repeats"], max_examples=20)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: check_policy("luiskv"), UnknownNameError, r"no policy named 'luiskv'; did you mean 'louiskv'\?"),
        (lambda: check_plugin("luis"), UnknownNameError, r"no plugin named 'luis'; did you mean 'louis'\?"),
        (
            lambda: check_policy("louiskv", only=["exact-buget"]),
            UnknownNameError,
            r"no promise named 'exact-buget'; did you mean 'exact-budget'\?",
        ),
        (
            lambda: check_stage(Patient, options={"patiense": st.just(1)}),
            ConfigError,
            r"options has 'patiense', which Patient has not; did you mean 'patience'\?",
        ),
        (
            lambda: check_policy(kvframe.policy("window"), options={"sink_size": st.just(1)}),
            ConfigError,
            "options has 'sink_size', which what is checked as it is has not",
        ),
        (
            lambda: check_policy("louiskv", options={"token_budget": st.just(0)}),
            ConfigError,
            r"policy 'louiskv': none of \d+ drawn compositions was accepted, the last one refused with "
            r"'TopBudget.token_budget must be an integer >= 1, got 0'; give strategies for its options",
        ),
    ],
)
def test_what_cannot_be_checked(call: Any, error: type[Exception], words: str) -> None:
    """Says what is wrong with the call."""
    with pytest.raises(error, match=words):
        call()


def test_a_case_of_ones_own() -> None:
    """Runs once, and is what the failure shows."""
    case = Case(batch_size=1, padding=(0,), turns=(Turn(chunks=(9, 4), num_steps=3),))
    with pytest.raises(ConformanceError) as raised:
        check_stage(OneForAll(), case=case, only=["contract"])
    (failure,) = raised.value.failures

    assert failure.case == case
    assert "Case(batch_size=1, padding=(0,), turns=(Turn(chunks=(9, 4), num_steps=3),))" in str(failure)


def test_an_extra_that_is_missing() -> None:
    """Without hypothesis kvframe works, and the kit says what to install."""
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import kvframe; kvframe.policy('louiskv')\n"
        "try:\n    import kvframe.testing\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "kvframe.testing draws its examples with hypothesis; pip install 'kvframe[testing]'\n"
