"""Which stage is at fault."""

from types import TracebackType

from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.stages import (
    EveryStep,
    FixedStride,
    HostPool,
    KeepOnDevice,
    MeanKey,
    PageUnits,
    Slot,
    Stage,
    TokenUnits,
    TopBudget,
)
from kvframe.testing.broken import Broken
from kvframe.testing.cases import Case
from kvframe.testing.promises import Promise, strange_slots
from kvframe.types import Execution


def blame(promise: Promise, policy: Policy, case: Case, execution: Execution, error: Exception) -> str:
    """A sentence about who breaks a promise in a case.

    Known from the check itself, or from where an error came; otherwise found by putting the core's own stages in the
    place of one stage after the other: with the culprit gone, the promise is kept.
    """
    known = error.stage if isinstance(error, Broken) else stage_of(error)
    if known is not None:
        return f"{known.slot} {known!r}"
    found = []
    for slot in strange_slots(policy):
        swapped = [_with(policy, slot, stage) for stage in _sound(slot, policy)]
        sound = [each for each in swapped if each is not None]
        if sound and all(_is_kept(promise, each, case, execution) for each in sound):
            found.append(f"{slot} {policy.stage(slot)!r}: with {sound[0].stage(slot)!r} in its place it is kept")
    if found:
        return "; or ".join(found)
    return "no stage alone: with any one of them replaced by the core's own it is not kept either"


def stage_of(error: BaseException) -> Stage | None:
    """The stage in whose method an error was raised."""
    found, traceback = None, error.__traceback__
    while isinstance(traceback, TracebackType):
        own = traceback.tb_frame.f_locals.get("self")
        if isinstance(own, Stage):
            found = own
        traceback = traceback.tb_next
    return found


def _with(policy: Policy, slot: Slot, stage: Stage) -> Policy | None:
    """The policy with another stage in a slot, or None if the two do not go together."""
    try:
        return policy.swap(**{slot: stage})
    except ConfigError:
        return None


def _sound(slot: Slot, policy: Policy) -> tuple[Stage, ...]:
    """Stages that keep every promise; more than one, as a fault may be hidden by what another stage makes of it."""
    choices: dict[Slot, tuple[Stage, ...]] = {
        "trigger": (EveryStep(), FixedStride(stride=2)),
        "units": (PageUnits(page_size=3), TokenUnits()),
        "scorer": (MeanKey(keep_values=True), MeanKey(keep_values=True, softmax=False, group_reduction="max")),
        "selector": (TopBudget(token_budget=max(1, policy.selector.capacity)),),
        "transfer": (HostPool(), KeepOnDevice()),
    }
    return choices[slot]


def _is_kept(promise: Promise, policy: Policy, case: Case, execution: Execution) -> bool:
    if not promise.applies(policy):
        return False
    try:
        promise.keep(policy, case, execution)
    except Exception:
        return False
    return True
