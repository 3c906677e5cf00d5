"""The swaps there are: every member of a slot in one policy's place, and that policy's stages in the others."""

from collections.abc import Iterator
from typing import Any, get_type_hints

import attrs
from attrs import frozen

from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.options import option_names
from kvframe.registry import PolicyRecord, Registry
from kvframe.stages import SLOTS, Slot, Stage
from kvframe.traits import traits_of

SIZES: dict[str, Any] = {
    "sink_size": 4,
    "token_budget": 128,
    "window_size": 32,
    "dense_layers": (),
    "end_ids": (1, 4),
    "filter_layers": (0,),
}
"""What every policy and stage is given, where it has the option: small, and large enough for units of 80 tokens."""


@frozen(kw_only=True)
class Swap:
    """A policy with one slot changed."""

    policy: Policy
    """As it is before."""
    slot: Slot
    stage: Stage
    used_by: tuple[str, ...] = ()
    """Policies that have the stage in this slot."""

    @property
    def label(self) -> str:
        """The stage's name, with the options that are not its defaults."""
        return label_of(self.stage)


@frozen(kw_only=True)
class Swaps:
    """All of them."""

    base: Policy
    into_base: tuple[Swap, ...]
    """Every member of every slot in the base policy's place."""
    from_base: tuple[Swap, ...]
    """The base policy's stages in every other policy that retrieves, without those that change nothing."""

    def __iter__(self) -> Iterator[Swap]:
        yield from self.into_base
        yield from self.from_base


def swaps(registry: Registry, base: str = "louiskv", distribution: str | None = None) -> Swaps:
    """The swaps between a policy and all that is registered.

    distribution: only what this distribution brings; None for everything that is installed.

    Members of a slot are the registered stages as they come, and the stages of registered policies; a stage with
    options of its own choosing is a member of its own.
    Raises UnknownNameError where `base` is no policy.
    """
    policies = {
        record.name: _small(record)
        for record in registry.policies()
        if distribution in (None, record.plugin.distribution)
    }
    own = registry.policy_spec(base)
    base_policy = _small(own)
    into_base = [
        Swap(policy=base_policy, slot=slot, stage=stage, used_by=used_by)
        for slot in SLOTS
        for stage, used_by in _members(registry, slot, policies, distribution, base_policy)
        if stage != base_policy.stage(slot)
    ]
    from_base = [
        Swap(policy=policy, slot=slot, stage=base_policy.stage(slot), used_by=(base,))
        for name, policy in policies.items()
        if traits_of(policy).retrieves and not _same_paper(registry.policy_spec(name), own)
        for slot in SLOTS
        if policy.stage(slot) != base_policy.stage(slot)
    ]
    return Swaps(base=base_policy, into_base=tuple(into_base), from_base=tuple(from_base))


def label_of(stage: Stage) -> str:
    """A stage's name, with the options that are neither its defaults nor those of `SIZES`."""
    changed = []
    for attribute in attrs.fields(type(stage)):  # type: ignore[arg-type]
        value = getattr(stage, attribute.name)
        if attribute.name not in SIZES and value != attribute.default:
            changed.append(label_of(value) if isinstance(value, Stage) else f"{attribute.name}={value!r}")
    return f"{stage.name}({', '.join(changed)})" if changed else stage.name


def _small(record: PolicyRecord) -> Policy:
    return record.make(**_sizes_of(record.config_cls))


def _sizes_of(config_cls: type[Any]) -> dict[str, Any]:
    return {name: SIZES[name] for name in option_names(config_cls) if name in SIZES}


def _same_paper(one: PolicyRecord, other: PolicyRecord) -> bool:
    return one.name == other.name or (one.paper is not None and one.paper == other.paper)


def _members(
    registry: Registry, slot: Slot, policies: dict[str, Policy], distribution: str | None, base: Policy
) -> list[tuple[Stage, tuple[str, ...]]]:
    """Every stage of a slot, and the policies that have it, in the order of their labels."""
    found: dict[Stage, list[str]] = {}
    used = {type(part) for policy in policies.values() for part in policy.stage(slot).with_parts()}
    for record in registry.stages(slot):
        if distribution in (None, record.plugin.distribution):
            # Where no policy says what a stage is made of, the base does.
            parts = {} if record.stage in used else _needed_parts(record.stage, base)
            try:
                found.setdefault(record.make(**_sizes_of(record.stage), **parts), [])
            except ConfigError:
                continue  # it needs options, and comes with the policies that give them
    for name, policy in policies.items():
        found.setdefault(policy.stage(slot), []).append(name)
    return [(stage, tuple(names)) for stage, names in sorted(found.items(), key=lambda item: label_of(item[0]))]


def _needed_parts(stage: type[Stage], base: Policy) -> dict[str, Stage]:
    """The base's own stages for those that a stage has to be given."""
    hints = get_type_hints(stage)
    needed = {
        attribute.name: hints.get(attribute.name)
        for attribute in attrs.fields(stage)  # type: ignore[arg-type]
        if attribute.default is attrs.NOTHING
    }
    return {
        name: base.stage(hint.slot)
        for name, hint in needed.items()
        if isinstance(hint, type) and issubclass(hint, Stage)
    }
