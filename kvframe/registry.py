"""What exists: the stages and policies of all plugins, by name."""

import functools
import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import attrs

from kvframe.errors import NameConflictError, PluginError, UnknownNameError
from kvframe.hookspecs import PolicySpec, StageSpec
from kvframe.options import configure
from kvframe.plugins import DISABLE_VARIABLE, PluginRecord, Plugins, create_plugin_manager
from kvframe.stages import SLOTS, Scorer, Selector, Stage, Transfer, Trigger, UnitBuilder
from kvframe.suggest import hint

if TYPE_CHECKING:
    from kvframe.composition import Policy

_BASES: dict[str, type[Stage]] = {base.slot: base for base in (Trigger, UnitBuilder, Scorer, Selector, Transfer)}
_NOUNS = {"units": "unit builder"}
_STAGE_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_POLICY_NAME = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")


@attrs.frozen(kw_only=True)
class StageRecord:
    """A stage on offer, and whose it is."""

    slot: str
    name: str
    stage: type[Stage]
    """The class, which is its own config."""
    summary: str
    paper: str | None
    plugin: PluginRecord

    def make(self, **options: Any) -> Stage:
        """The stage with these options; `ConfigError` if it does not have or accept them."""
        return configure(self.stage, options)


@attrs.frozen(kw_only=True)
class PolicyRecord:
    """A policy on offer, and whose it is."""

    name: str
    spec: PolicySpec
    plugin: PluginRecord

    @property
    def config_cls(self) -> type[Any]:
        """The attrs class whose fields are the policy's options."""
        return self.spec.config_cls

    @property
    def summary(self) -> str:
        """One line about it."""
        return self.spec.summary

    @property
    def paper(self) -> str | None:
        """Where it was published."""
        return self.spec.paper

    @property
    def about(self) -> str:
        """What the module of its config says of it: the paper, the stages, and where the policy differs from it."""
        return inspect.getdoc(sys.modules[self.config_cls.__module__]) or ""

    @property
    def needs(self) -> tuple[str, ...]:
        """Options without a default: the policy cannot be made without them."""
        fields = [field for field in attrs.fields(self.config_cls) if field.init and field.default is attrs.NOTHING]
        return tuple(field.alias or field.name for field in fields)

    def make(self, **options: Any) -> "Policy":
        """The policy with these options; `ConfigError` if it does not have or accept them."""
        # Policy.from_dict looks stages up here, so the modules need each other
        from kvframe.composition import Policy

        policy = self.spec.build(configure(self.config_cls, options))
        if not isinstance(policy, Policy):
            raise PluginError(f"{self.plugin}: build of policy {self.name!r} returned {policy!r}, expected a Policy")
        return policy


class Registry:
    """Stages and policies of one set of plugins. Names never replace each other: a clash raises `NameConflictError`."""

    def __init__(self, plugins: Plugins) -> None:
        self.plugins = plugins
        self._stages: dict[str, dict[str, StageRecord]] = {slot: {} for slot in SLOTS}
        for plugin, stage_spec in plugins.stages():
            self._add_stage(_stage_record(plugin, stage_spec))
        self._policies: dict[str, PolicyRecord] = {}
        for plugin, policy_spec in plugins.policies():
            self._add_policy(_policy_record(plugin, policy_spec))

    def stage(self, slot: str, name: str) -> StageRecord:
        """The stage of this name; `UnknownNameError` says what was probably meant, and if another slot has it."""
        known, noun = self._slot(slot), _noun(slot)
        _require_text(name, noun)
        if name not in known:
            elsewhere = [_noun(other) for other in SLOTS if name in self._stages[other]]
            if elsewhere:
                end = (
                    f"; {name!r} is a {' and a '.join(elsewhere)} (known {noun}s: {', '.join(sorted(known)) or 'none'})"
                )
            else:
                end = hint(name, sorted(known))
            raise UnknownNameError(f"no {noun} named {name!r}{end}{self._disabled_note()}")
        return known[name]

    def stages(self, slot: str | None = None) -> tuple[StageRecord, ...]:
        """All stages, or those of one slot, in the order of slots and names."""
        slots = SLOTS if slot is None else (slot,)
        return tuple(record for each in slots for _, record in sorted(self._slot(each).items()))

    def policy_spec(self, name: str) -> PolicyRecord:
        """The policy of this name; `UnknownNameError` says what was probably meant."""
        _require_text(name, "policy")
        if name not in self._policies:
            raise UnknownNameError(
                f"no policy named {name!r}{hint(name, sorted(self._policies))}{self._disabled_note()}"
            )
        return self._policies[name]

    def policies(self) -> tuple[PolicyRecord, ...]:
        """All policies, in the order of their names."""
        return tuple(record for _, record in sorted(self._policies.items()))

    def make_stage(self, slot: str, name: str, /, **options: Any) -> Stage:
        """The stage of this name with these options."""
        return self.stage(slot, name).make(**options)

    def make_policy(self, name: str, /, **options: Any) -> "Policy":
        """The policy of this name with these options."""
        return self.policy_spec(name).make(**options)

    def _slot(self, slot: str) -> dict[str, StageRecord]:
        _require_text(slot, "slot")
        if slot not in self._stages:
            raise UnknownNameError(f"no slot named {slot!r}{hint(slot, SLOTS)}")
        return self._stages[slot]

    def _add_stage(self, record: StageRecord) -> None:
        first = self._stages[record.slot].setdefault(record.name, record)
        if first is not record:
            what = f"{_noun(record.slot)} {record.name!r}"
            raise NameConflictError(_twice(what, (first.stage, first.plugin), (record.stage, record.plugin)))

    def _add_policy(self, record: PolicyRecord) -> None:
        first = self._policies.setdefault(record.name, record)
        if first is not record:
            what = f"policy {record.name!r}"
            raise NameConflictError(_twice(what, (first.config_cls, first.plugin), (record.config_cls, record.plugin)))

    def _disabled_note(self) -> str:
        names = ", ".join(record.name for record in self.plugins.disabled)
        return f"; {DISABLE_VARIABLE} leaves out: {names}" if names else ""


@functools.cache
def default_registry() -> Registry:
    """The registry of the installed plugins, made at the first call."""
    return Registry(create_plugin_manager())


def _noun(slot: str) -> str:
    return _NOUNS.get(slot, slot)


def _require_text(name: object, noun: str) -> None:
    # names also come from files
    if not isinstance(name, str):
        raise UnknownNameError(f"expected the name of a {noun}, got {name!r}")


def _twice(what: str, first: tuple[type, PluginRecord], second: tuple[type, PluginRecord]) -> str:
    places = " and ".join(f"{cls.__module__}.{cls.__qualname__} ({plugin})" for cls, plugin in (first, second))
    return f"{what} is registered twice: {places}; rename one, or block its plugin with {DISABLE_VARIABLE}"


def _stage_record(plugin: PluginRecord, spec: StageSpec) -> StageRecord:
    stage = spec.stage
    bases = ", ".join(base.__name__ for base in _BASES.values())
    if not (isinstance(stage, type) and issubclass(stage, Stage)):
        raise PluginError(f"{plugin}: a StageSpec holds {stage!r}, expected a class derived from one of {bases}")
    where = f"{plugin}: stage {stage.__module__}.{stage.__qualname__}"
    slot = getattr(stage, "slot", None)
    if slot not in _BASES:
        raise PluginError(f"{where} has slot {slot!r}{hint(str(slot), SLOTS)}; derive it from one of {bases}")
    if not issubclass(stage, _BASES[slot]):
        raise PluginError(f"{where} has slot {slot!r}, but is no {_BASES[slot].__name__}; derive it from that class")
    if inspect.isabstract(stage):
        raise PluginError(f"{where} is abstract; it still has to define {', '.join(sorted(stage.__abstractmethods__))}")
    if "__attrs_attrs__" not in vars(stage):
        raise PluginError(f"{where} is not an attrs class; write @attrs.frozen(kw_only=True) above it")
    name = getattr(stage, "name", None)
    if not (isinstance(name, str) and _STAGE_NAME.fullmatch(name)):
        raise PluginError(f"{where} has the name {name!r}, expected kebab-case text such as 'mean-key'")
    return StageRecord(slot=slot, name=name, stage=stage, summary=spec.summary, paper=spec.paper, plugin=plugin)


def _policy_record(plugin: PluginRecord, spec: PolicySpec) -> PolicyRecord:
    name = spec.name
    if not (isinstance(name, str) and _POLICY_NAME.fullmatch(name)):
        raise PluginError(
            f"{plugin}: a PolicySpec has the name {name!r}, expected lower-case words joined by '-' or '_'"
        )
    where = f"{plugin}: policy {name!r}"
    if not (isinstance(spec.config_cls, type) and attrs.has(spec.config_cls)):
        raise PluginError(f"{where} has config_cls={spec.config_cls!r}, expected an attrs class")
    if not callable(spec.build):
        raise PluginError(
            f"{where} has build={spec.build!r}, expected a function from {spec.config_cls.__name__} to Policy"
        )
    return PolicyRecord(name=name, spec=spec, plugin=plugin)
