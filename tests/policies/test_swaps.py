"""Any member of a slot works with any other, or is refused with the reason."""

import itertools

import pytest
from helpers import stage_id

import kvframe
from kvframe import Policy
from kvframe.errors import KvframeError
from kvframe.registry import default_registry
from kvframe.stages import SLOTS, Slot, Stage
from kvframe.testing.cases import Case, Turn, assert_equal_traces, play
from kvframe.testing.small import small_policy, small_stages

CASE = Case(padding=(0, 6), turns=(Turn(chunks=(23,), num_steps=9), Turn(chunks=(5,), num_steps=5)))


def louiskv() -> Policy:
    """Small."""
    return small_policy(default_registry().policy_spec("louiskv"))


def all_choices() -> list[tuple[Stage, ...]]:
    """Every member of every slot with every other, in the order of `SLOTS`."""
    return list(itertools.product(*map(small_stages, SLOTS)))


def run_both(policy: Policy) -> None:
    """Both executions do the same."""
    layout = CASE.layout()
    text = CASE.text(layout)
    dense, offload = (play(CASE.layer(policy, execution), text, CASE) for execution in ("dense", "offload"))
    assert_equal_traces(dense, offload, 1e-10)


@pytest.mark.parametrize("choice", all_choices(), ids=lambda choice: "-".join(map(stage_id, choice)))
def test_cross_product(choice: tuple[Stage, ...]):
    """Every composition of registered stages runs, the same in both executions, unless it is refused with a reason."""
    refusal = None
    try:
        policy = louiskv().swap(**dict(zip(SLOTS, choice)))
        CASE.layer(policy, "offload")
    except KvframeError as error:
        refusal = str(error)
    if refusal is None:
        run_both(policy)
    else:
        names = [name for stage in choice for name in (stage.name, type(stage).__name__)]
        assert any(name in refusal for name in names), f"the refusal names none of the stages: {refusal}"


def default_choices() -> list[tuple[Slot, Stage]]:
    """Every registered stage that needs no options, with those it has by default."""
    found = []
    for record in default_registry().stages():
        try:
            found.append((record.slot, record.make()))
        except KvframeError:
            assert record.name == "decoupled", "a stage that cannot be made without options needs a test of its own"
    return found


@pytest.mark.parametrize("slot, stage", default_choices(), ids=lambda part: getattr(part, "name", part))
def test_louiskv_with_one_slot_swapped(slot: Slot, stage: Stage):
    """`swap` puts a stage, as it comes, into its slot, leaves the other slots alone, and the result runs."""
    policy = kvframe.policy("louiskv")
    swapped = policy.swap(**{slot: stage})

    assert swapped.stage(slot) is stage
    assert all(swapped.stage(other) == policy.stage(other) for other in SLOTS if other != slot)
    run_both(louiskv().swap(**{slot: stage}) if slot != "units" else swapped)


def test_a_refusal_says_why():
    """A budget below the size of a unit is refused, and both are named."""
    with pytest.raises(KvframeError, match=r"budget of 10 tokens .*PageUnits\(page_size=11\)"):
        louiskv().swap(units=kvframe.PageUnits(page_size=11))
