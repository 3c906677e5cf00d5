"""The matrix of swaps: what it makes of policies and stages that are not as they should be."""

import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from attrs import frozen
from torch import Tensor

import kvframe
from kvframe import LayerLayout, MeanKey, PolicySpec, StageSpec, TopBudget, hookimpl
from kvframe.errors import UnknownNameError
from kvframe.matrix import Outcome, Verdict, swaps
from kvframe.matrix.trial import try_swap
from kvframe.memory.pool import RowPool, RowStore
from kvframe.registry import Registry
from kvframe.stages import HostPool, PageUnits, Stage


class ForgetfulPool(RowPool):
    """Brings other rows than it was asked for."""

    def recall(self, incoming: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
        super().recall(torch.where(incoming > 0, incoming - 1, incoming), k_slots, v_slots)


@frozen(kw_only=True)
class Forgetful(HostPool):
    name = "forgetful"

    def init(self, layout: LayerLayout, num_rows: int) -> RowStore:
        return ForgetfulPool(layout, num_rows, torch.device("cpu"), crosses_link=True)


@frozen(kw_only=True)
class Failing(MeanKey):
    name = "failing"

    def score(self, *args: Any) -> Tensor:
        raise ZeroDivisionError("no units today")


CALLS = itertools.count()


@frozen(kw_only=True)
class Undecided(MeanKey):
    """Its scores differ from call to call, so that the executions do not select the same."""

    name = "undecided"

    def score(self, *args: Any) -> Tensor:
        scores = super().score(*args)
        generator = torch.Generator().manual_seed(next(CALLS))
        return torch.where(scores > 0, torch.rand(scores.shape, generator=generator), scores)


@frozen(kw_only=True)
class GuardedConfig:
    """A policy whose plugin wants its own selector."""

    token_budget: int = 64


def build_guarded(config: GuardedConfig) -> kvframe.Policy:
    """Pages."""
    return kvframe.policy("quest").swap(name="guarded", selector=TopBudget(token_budget=config.token_budget))


def plugin() -> ModuleType:
    """One that refuses a scorer, and brings a policy."""
    module = ModuleType("kv_guarded")
    vars(module).update(KVFRAME_API_VERSION=1)

    @hookimpl
    def kvframe_policies() -> list[PolicySpec]:
        return [PolicySpec(name="guarded", config_cls=GuardedConfig, build=build_guarded)]

    @hookimpl
    def kvframe_stages() -> list[StageSpec]:
        return [StageSpec(Failing)]

    @hookimpl
    def kvframe_check_policy(policy: kvframe.Policy) -> list[str] | None:
        return ["Failing never goes with pages"] if isinstance(policy.units, PageUnits) else None

    vars(module).update(
        kvframe_policies=kvframe_policies, kvframe_stages=kvframe_stages, kvframe_check_policy=kvframe_check_policy
    )
    return module


@pytest.fixture(scope="module")
def registry() -> Registry:
    """With that plugin."""
    return Registry(kvframe.create_plugin_manager(plugins=[plugin()]))


def tried(stage: Stage, registry: Registry, base: str = "louiskv") -> Outcome:
    """A stage in the place of another policy's."""
    made = swaps(registry, base)
    return try_swap(kvframe.matrix.Swap(policy=made.base, slot=stage.slot, stage=stage), registry)


def test_a_difference_is_seen(registry: Registry):
    """A store that brings the wrong rows, and a scorer that does not say the same twice, are different."""
    wrong_rows, other_tokens = tried(Forgetful(), registry), tried(Undecided(), registry)

    assert (wrong_rows.verdict, wrong_rows.reason) == (Verdict.DIFFERENT, "offload gives another output than dense")
    assert (other_tokens.verdict, other_tokens.reason) == (
        Verdict.DIFFERENT,
        "offload attends to other tokens than dense",
    )


def test_a_failure_is_told(registry: Registry):
    """Whatever a stage raises while it runs is an error, with its type."""
    outcome = tried(Failing(), registry)

    assert (outcome.verdict, outcome.reason) == (Verdict.ERROR, "ZeroDivisionError: no units today")


def test_refusals_come_with_their_reason(registry: Registry):
    """Those of the composition, and those of plugins."""
    too_large, unwanted = tried(PageUnits(page_size=129), registry), tried(PageUnits(), registry)

    assert too_large.verdict is unwanted.verdict is Verdict.REFUSED
    assert "a budget of 128 tokens is smaller than one unit: PageUnits(page_size=129)" in too_large.reason
    assert "Failing never goes with pages" in unwanted.reason and "kv_guarded" in unwanted.reason


def test_any_policy_can_be_the_base(registry: Registry):
    """Its stages go into the others; a policy that is not there is an error."""
    made = swaps(registry, "guarded")

    assert made.base.name == "guarded" and made.base.selector.capacity == 128
    assert {swap.policy.name for swap in made.from_base} >= {"louiskv", "clusterkv"}
    assert all(swap.stage in {made.base.stage(swap.slot)} for swap in made.from_base)
    with pytest.raises(UnknownNameError, match="no policy named 'guarde'; did you mean 'guarded'"):
        swaps(registry, "guarde")


def test_one_distribution_alone(registry: Registry):
    """What other packages bring is left out."""
    everything, own = swaps(registry), swaps(registry, distribution="kvframe")

    assert any(swap.stage == Failing() for swap in everything)
    assert not any(swap.stage == Failing() for swap in own)
    assert not any(swap.policy.name == "guarded" for swap in own)
