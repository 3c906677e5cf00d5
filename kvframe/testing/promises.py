"""Everything that is checked of a policy: the invariants that it declares, and what every policy is held to."""

import json
from collections.abc import Callable
from typing import Any

from attrs import frozen

from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.options import configure
from kvframe.registry import Registry, default_registry
from kvframe.stages import SLOTS, Slot, Stage
from kvframe.testing.broken import Broken
from kvframe.testing.capture import steps_can_be_captured
from kvframe.testing.cases import Case
from kvframe.testing.contracts import stages_keep_their_contracts
from kvframe.testing.executions import layer_is_the_same, model_is_the_same, model_rows_are_independent
from kvframe.testing.invariants import PROPERTIES, Property
from kvframe.testing.small import small_policy
from kvframe.types import Execution, Invariant


def _always(policy: Policy) -> bool:
    return True


@frozen(kw_only=True)
class Promise:
    """Something that a policy is held to, and how it is found out whether it keeps it."""

    name: str
    """What a failure and `only=` call it."""
    text: str
    keep: Property
    """Runs a case, and raises Broken where the promise is not kept."""
    applies: Callable[[Policy], bool] = _always
    """Whether a policy makes it."""
    share: float = 1.0
    """Of the examples that are asked for: fewer where one is expensive."""
    is_basic: bool = False
    """Whether a policy that breaks it is not looked at any further."""
    is_small: bool = False
    """Whether it takes shorter texts."""
    by_execution: bool = False
    """Whether a case runs in the one execution or in the other."""


def _invariant(invariant: Invariant) -> Promise:
    return Promise(
        name=invariant.name.lower().replace("_", "-"),
        text=invariant.value,
        keep=PROPERTIES[invariant],
        applies=_promises(invariant),
        by_execution=True,
    )


def _promises(invariant: Invariant) -> Callable[[Policy], bool]:
    return lambda policy: invariant in policy.promises


def all_promises(registry: Registry | None = None, *, by_name: bool = False) -> tuple[Promise, ...]:
    """In the order in which they are looked at: from the single stage to the whole model.

    registry: where names are looked up; the installed plugins unless given.
    by_name: the policy is a registered one, so all of its stages have to be.
    """
    found = registry or default_registry()
    return (
        Promise(
            name="contract",
            text="a stage gives what its slot asks for",
            keep=stages_keep_their_contracts,
            is_basic=True,
        ),
        Promise(
            name="plain-data",
            text="plain data describes a policy, so that it can be written down and made again",
            keep=lambda policy, case, execution: _round_trip(policy, found if by_name else _WithStages(found, policy)),
        ),
        *map(_invariant, Invariant),
        Promise(
            name="same-executions",
            text="the executions dense and offload attend to the same tokens and give the same output",
            keep=layer_is_the_same,
        ),
        Promise(
            name="capturable",
            text="a stage that says it is capturable can be recorded as a CUDA graph",
            keep=steps_can_be_captured,
            applies=lambda policy: any(policy.stage(slot).capturable for slot in SLOTS),
            by_execution=True,
        ),
        Promise(
            name="same-executions-in-a-model",
            text="dense and offload give a model the same attended tokens and logits",
            keep=lambda policy, case, execution: model_is_the_same(policy, case, execution, found),
            share=0.5,
            is_small=True,
        ),
        Promise(
            name="row-independent-in-a-model",
            text="a row's result in a model depends neither on its neighbours in the batch nor on padding",
            keep=model_rows_are_independent,
            applies=_promises(Invariant.ROW_INDEPENDENT),
            share=0.25,
            is_small=True,
            by_execution=True,
        ),
        Promise(
            name="swaps",
            text="a stage works in LouisKV, or is refused with a reason that names it",
            keep=lambda policy, case, execution: _swaps(policy, case, execution, found),
            share=0.25,
            is_small=True,
        ),
    )


class _WithStages(Registry):
    """A registry that also knows the stages of a policy, registered or not."""

    def __init__(self, registry: Registry, policy: Policy) -> None:
        self._registry = registry
        parts = [part for slot in SLOTS for part in policy.stage(slot).with_parts()]
        self._own: dict[tuple[str, str], type[Stage]] = {(part.slot, part.name): type(part) for part in parts}

    def make_stage(self, slot: str, name: str, /, **options: Any) -> Stage:
        """The policy's own stage of this name, or a registered one."""
        own = self._own.get((slot, name))
        return self._registry.make_stage(slot, name, **options) if own is None else configure(own, options)


def _round_trip(policy: Policy, registry: Registry) -> None:
    """A policy is equal to what is made from its own description, which is JSON."""
    try:
        written = json.loads(json.dumps(policy.to_dict()))
    except TypeError as error:
        raise Broken(f"to_dict gives what JSON cannot hold: {error}") from error
    try:
        again = Policy.from_dict(written, registry)
    except ConfigError as error:
        raise Broken(f"written down, it cannot be made again: {error}") from error
    for slot in SLOTS:
        if again.stage(slot) != policy.stage(slot):
            raise Broken(
                f"written down and made again, {policy.stage(slot)!r} is {again.stage(slot)!r}; fields that are "
                "neither plain values, tuples of them nor stages need a converter",
                policy.stage(slot),
            )
    if again != policy:
        raise Broken(f"written down and made again, {policy!r} is {again!r}")


def _swaps(policy: Policy, case: Case, execution: Execution, registry: Registry) -> None:
    """Each stage that is not the core's own, in LouisKV's place."""
    louiskv = small_policy(registry.policy_spec("louiskv"))
    for slot in strange_slots(policy):
        stage = policy.stage(slot)
        try:
            swapped = louiskv.swap(**{slot: stage})
            case.layer(swapped, "offload")
        except ConfigError as refusal:
            names = [name for part in stage.with_parts() for name in (part.name, type(part).__name__)]
            if not any(name in str(refusal) for name in names):
                raise Broken(f"LouisKV refuses it without naming it: {refusal}", stage) from refusal
            continue
        try:
            layer_is_the_same(swapped, case, execution)
        except Broken as broken:
            raise Broken(f"in LouisKV: {broken}", stage) from broken


def strange_slots(policy: Policy) -> list[Slot]:
    """Slots whose stage, or a part of it, is not the core's own."""
    return [
        slot
        for slot in SLOTS
        if any(not type(part).__module__.startswith("kvframe.") for part in policy.stage(slot).with_parts())
    ]
