"""Every stage in LouisKV's place, and LouisKV's in every other policy: they run, or are refused with the reason."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvframe
from kvframe.errors import KvframeError
from kvframe.matrix import Outcome, Verdict, outcomes, swaps
from kvframe.matrix.swaps import Swap, Swaps
from kvframe.matrix.tables import markdown_page
from kvframe.plugins import create_plugin_manager
from kvframe.registry import Registry, default_registry
from kvframe.stages import SLOTS, Slot, Stage
from kvframe.testing.cases import Case, Turn, assert_equal_traces, play
from kvframe.testing.small import small_policy, small_stages
from kvframe.testing.strategies import examples
from kvframe.traits import traits_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "swaps.md"


@pytest.fixture(scope="module")
def registry() -> Registry:
    """What kvframe's own distribution brings."""
    return Registry(create_plugin_manager())


@pytest.fixture(scope="module")
def made(registry: Registry) -> Swaps:
    """The swaps."""
    return swaps(registry, distribution="kvframe")


@pytest.fixture(scope="module")
def found(registry: Registry, made: Swaps) -> list[Outcome]:
    """And what became of them."""
    return list(outcomes(made, registry))


def test_swaps_run_or_are_refused(found: list[Outcome]):
    """None ends in an error or in a difference between the executions."""
    bad = [outcome for outcome in found if outcome.verdict in (Verdict.ERROR, Verdict.DIFFERENT)]

    assert bad == []


def test_what_runs_has_run(found: list[Outcome]):
    """Where the trigger fires and the selector takes something, rows were selected and came back; a head that attends
    in full may go without."""
    for outcome in found:
        swap = outcome.swap
        policy = swap.policy.swap(**{swap.slot: swap.stage}) if outcome.verdict is Verdict.RUNS else None
        if policy is None or policy.trigger == kvframe.Never() or policy.trigger.attends_in_full:
            continue
        if policy.selector.capacity:
            assert outcome.selections and outcome.rows_recalled, swap.label


def test_refusals_name_the_stage(found: list[Outcome]):
    """A reason says which stage does not fit."""
    for outcome in found:
        if outcome.verdict is Verdict.REFUSED:
            names = (outcome.swap.stage.name, type(outcome.swap.stage).__name__)
            assert any(name in outcome.reason for name in names), outcome.reason


def test_no_swap_is_left_out(registry: Registry, made: Swaps):
    """Every registered stage is in LouisKV's place, and every policy that retrieves gets each of LouisKV's stages."""
    own = {(slot, part.name) for slot in SLOTS for part in made.base.stage(slot).with_parts()}
    tried = {(swap.slot, part.name) for swap in made.into_base for part in swap.stage.with_parts()}
    assert {(record.slot, record.name) for record in registry.stages()} <= own | tried

    for record in registry.policies():
        policy = record.make()
        if traits_of(policy).retrieves and not record.name.startswith("louiskv"):
            changed = {swap.slot for swap in made.from_base if swap.policy.name == record.name}
            same = {slot for slot in SLOTS if type(policy.stage(slot)) is type(made.base.stage(slot))}
            assert changed | same == set(SLOTS)


def test_page_is_up_to_date(made: Swaps, found: list[Outcome]):
    """The page shows what the command would write today."""
    command = "kvframe matrix --distribution kvframe --markdown docs/results/swaps.md"

    assert PAGE.read_text(encoding="utf-8") == markdown_page(made, found), f"run: {command}"


# Any member of any slot with any other, in the order of `SLOTS`: more than can be run one by one.
any_choice = st.tuples(*(st.sampled_from(small_stages(slot)) for slot in SLOTS))
CASE = Case(padding=(0, 6), turns=(Turn(chunks=(23,), num_steps=9), Turn(chunks=(5,), num_steps=5)))


@examples(3)
@given(choice=any_choice)
def test_cross_product(choice: tuple[Stage, ...]):
    """A composition of registered stages runs, the same in both executions, unless it is refused with a reason."""
    louiskv = small_policy(default_registry().policy_spec("louiskv"))
    refusal = None
    try:
        policy = louiskv.swap(**dict(zip(SLOTS, choice)))
        dense, offload = (CASE.layer(policy, execution) for execution in ("dense", "offload"))
    except KvframeError as error:
        refusal = str(error)
    if refusal is None:
        text = CASE.text(dense.layout)
        assert_equal_traces(play(dense, text, CASE), play(offload, text, CASE), 1e-10)
    else:
        names = [name for stage in choice for name in (stage.name, type(stage).__name__)]
        assert any(name in refusal for name in names), f"the refusal names none of the stages: {refusal}"


def default_choices() -> list[tuple[Slot, Stage]]:
    """Every registered stage, with the options it has by default; small where it needs some."""
    choices = []
    for record in default_registry().stages():
        try:
            choices.append((record.slot, record.make()))
        except KvframeError:
            choices += [(record.slot, stage) for stage in small_stages(record.slot) if stage.name == record.name]
    return choices


@pytest.mark.parametrize("slot, stage", default_choices(), ids=lambda part: getattr(part, "name", part))
def test_swap_changes_one_slot(slot: Slot, stage: Stage):
    """`swap` puts a stage, as it comes, into its slot and leaves the other slots alone."""
    policy = kvframe.policy("louiskv", cluster_size=4)
    if isinstance(stage, kvframe.Selector) and stage.needs_means:
        policy = policy.swap(scorer=kvframe.MeanKey(keep_values=True))
    if isinstance(stage, kvframe.Trigger) and stage.reviews:
        policy = policy.swap(scorer=kvframe.MeanKey(keep_values=True), selector=kvframe.SketchRerank())
    swapped = policy.swap(**{slot: stage})

    assert swapped.stage(slot) is stage
    assert all(swapped.stage(other) == policy.stage(other) for other in SLOTS if other != slot)


def test_a_refusal_says_why():
    """A budget below the size of a unit is refused, and both are named."""
    louiskv = small_policy(default_registry().policy_spec("louiskv"))
    with pytest.raises(KvframeError, match=r"budget of 10 tokens .*PageUnits\(page_size=11\)"):
        louiskv.swap(units=kvframe.PageUnits(page_size=11))


def test_a_swap_is_told_by_what_it_changes():
    """The label has the stage's name and the options that are not its defaults, parts included."""
    units = kvframe.DecoupledUnits(prompt=kvframe.ClusterUnits(block_size=None), output=kvframe.TokenUnits())
    swap = Swap(policy=kvframe.policy("louiskv"), slot="units", stage=units)

    assert swap.label == "decoupled(clusters(block_size=None), tokens)"
