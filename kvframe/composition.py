"""A policy: one stage in each slot, and what always stays on the device."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import attrs
from attrs import field, frozen

from kvframe.errors import ConfigError, SlotError
from kvframe.stages import SLOTS, Scorer, Selector, Slot, Stage, Transfer, Trigger, UnitBuilder
from kvframe.suggest import hint
from kvframe.types import Invariant
from kvframe.validators import integer

if TYPE_CHECKING:
    from kvframe.registry import Registry

_ABSTRACT: dict[str, type[Stage]] = {
    "trigger": Trigger,
    "units": UnitBuilder,
    "scorer": Scorer,
    "selector": Selector,
    "transfer": Transfer,
}


def _check_slot(policy: Any, attribute: "attrs.Attribute[Any]", value: object) -> None:
    check_slot(attribute.name, value)


def check_slot(slot: str, value: object) -> None:
    """Raise SlotError unless `value` is a stage of this slot."""
    wanted = _ABSTRACT[slot]
    if isinstance(value, wanted):
        return
    if isinstance(value, Stage):
        raise SlotError(
            f"the {slot} slot takes a {wanted.__name__}, but {value!r} is a {_ABSTRACT[value.slot].__name__}; "
            f"pass it as {value.slot}=..."
        )
    if isinstance(value, type) and issubclass(value, Stage):
        raise SlotError(f"the {slot} slot takes an instance, got the class {value.__name__}; write {value.__name__}()")
    raise SlotError(f"the {slot} slot takes a {wanted.__name__}, got {value!r}")


def _to_layers(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | range) else value


@frozen(kw_only=True)
class Policy:
    """Decides which KV a decode step attends to: sinks, at most `selector.capacity` retrieved tokens, and the window.

    Immutable and comparable; `swap` gives a variant. Raises SlotError for a stage in the wrong slot and ConfigError for
    sizes that cannot work.
    """

    name: str = "custom"
    trigger: Trigger = field(validator=_check_slot)
    units: UnitBuilder = field(validator=_check_slot)
    scorer: Scorer = field(validator=_check_slot)
    selector: Selector = field(validator=_check_slot)
    transfer: Transfer = field(validator=_check_slot)
    sink_size: int = field(default=64, validator=integer(at_least=0))
    """First tokens of a sequence, always attended."""
    window_size: int = field(default=256, validator=integer(at_least=1))
    """Last tokens of a sequence, always attended; older ones stay as well until their whole unit has left."""
    dense_layers: tuple[int, ...] | Literal["all"] = field(default=(), converter=_to_layers)
    """Layers that keep their whole KV on the device and attend to all of it."""

    @dense_layers.validator
    def _check_dense_layers(self, attribute: Any, value: object) -> None:
        if value == "all":
            return
        if not isinstance(value, tuple) or not all(type(layer) is int and layer >= 0 for layer in value):
            raise ConfigError(f"Policy.dense_layers must be layer numbers >= 0, as in (0, 1), or 'all'; got {value!r}")

    def __attrs_post_init__(self) -> None:
        capacity, unit_size = self.selector.capacity, self.units.unit_size
        if 0 < capacity < unit_size:
            raise ConfigError(
                f"a budget of {capacity} tokens is smaller than one unit: {self.units!r} makes units of {unit_size}; "
                "raise the budget or make the units smaller"
            )
        if self.selector.needs_means and self.scorer.means is None:
            raise ConfigError(
                f"{type(self.selector).__name__} works with mean keys and values of units, and {self.scorer!r} keeps "
                "none; use a scorer that does, such as MeanKey(keep_values=True)"
            )
        if self.trigger.reviews and not self.selector.ranks:
            raise ConfigError(
                f"{type(self.trigger).__name__} asks which share of the attention a token would get, and "
                f"{self.selector!r} does not weigh tokens; use a selector that does, such as SketchRerank()"
            )
        if self.trigger.reviews and self.transfer.drops:
            raise ConfigError(
                f"{type(self.trigger).__name__} looks for tokens that are missed, and {type(self.transfer).__name__} "
                "drops what it misses for good; use a transfer that keeps everything, such as HostPool"
            )
        if self.units.regroup_size is not None and self.transfer.drops:
            raise ConfigError(
                f"{self.units!r} groups old tokens anew, and {type(self.transfer).__name__} keeps only what is "
                "selected; use a transfer that keeps everything, such as HostPool"
            )
        if self.trigger.attends_in_full and self.transfer.drops:
            raise ConfigError(
                f"{type(self.trigger).__name__} has steps attend to everything, and {type(self.transfer).__name__} "
                "keeps only what is selected; use a transfer that keeps everything, such as HostPool"
            )

    def stage(self, slot: Slot) -> Stage:
        """The stage in a slot."""
        found: Stage = getattr(self, slot)
        return found

    def swap(self, **changes: Any) -> Self:
        """The same policy with some of its fields changed.

        Raises ConfigError for a field there is none of, SlotError for a stage in the wrong slot.
        """
        known = [attribute.name for attribute in attrs.fields(type(self))]
        for key, value in changes.items():
            if key not in known:
                raise ConfigError(f"a policy has no field {key!r}{self._owner(key) or hint(key, known, 'fields')}")
            if key in SLOTS:
                check_slot(key, value)
        return attrs.evolve(self, **changes)

    def _owner(self, option: str) -> str:
        """Where an option that is no field of a policy belongs, for an error; empty if nowhere."""
        for slot in SLOTS:
            stage = self.stage(slot)
            if any(attribute.name == option for attribute in attrs.fields(type(stage))):  # type: ignore[arg-type]
                example = f"swap({slot}=attrs.evolve(policy.{slot}, {option}=...))"
                return (
                    f"; {type(stage).__name__} in slot {slot} has it: {example}, or kvframe.policy(name, {option}=...)"
                )
        return ""

    def is_dense(self, layer_idx: int) -> bool:
        """Whether a layer keeps its whole KV on the device."""
        return self.dense_layers == "all" or layer_idx in self.dense_layers

    @property
    def needs_token_ids(self) -> bool:
        """Whether one of its stages is to be told the ids of tokens."""
        return any(part.needs_token_ids for slot in SLOTS for part in self.stage(slot).with_parts())

    def fitted(self, tokenizer: Any) -> Self:
        """The policy for texts of a Hugging Face tokenizer; itself, unless a stage has to know the vocabulary."""
        stages = {slot: self.stage(slot).fitted(tokenizer) for slot in SLOTS}
        changed = {slot: stage for slot, stage in stages.items() if stage is not self.stage(slot)}
        return self.swap(**changed) if changed else self

    @property
    def promises(self) -> tuple[Invariant, ...]:
        """The invariants this composition keeps: all but those that one of its stages, or a part of one, waives."""
        waived = frozenset().union(*(part.waives for slot in SLOTS for part in self.stage(slot).with_parts()))
        return tuple(invariant for invariant in Invariant if invariant not in waived)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (str, int, float, bool, None, list, dict) from which `from_dict` makes an equal policy."""
        return {attribute.name: _to_plain(getattr(self, attribute.name)) for attribute in attrs.fields(type(self))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], registry: "Registry | None" = None) -> Self:
        """The policy that `to_dict` described.

        Raises UnknownNameError for a stage that no installed plugin brings, ConfigError for a field it does not know.
        """
        if registry is None:
            from kvframe.registry import default_registry

            registry = default_registry()
        known = {attribute.name for attribute in attrs.fields(cls)}
        for key in data:
            if key not in known:
                raise ConfigError(f"a policy has no field {key!r}{hint(key, sorted(known), 'fields')}")
        missing = [slot for slot in SLOTS if slot not in data]
        if missing:
            raise ConfigError(f"a policy needs a stage in every slot; nothing was given for: {', '.join(missing)}")
        return cls(**{key: _from_plain(key, value, registry) for key, value in data.items()})

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.sink_size} sinks + {self.selector.capacity} retrieved + {self.window_size} recent"
        ]
        lines += [f"  {slot:<9} {self.stage(slot)!r}" for slot in SLOTS]
        lines.append(f"  dense layers: {self.dense_layers if self.dense_layers else 'none'}")
        return "\n".join(lines)


def _to_plain(value: Any) -> Any:
    if isinstance(value, Stage):
        fields = {attribute.name: _to_plain(getattr(value, attribute.name)) for attribute in attrs.fields(type(value))}  # type: ignore[arg-type]
        return {"slot": value.slot, "stage": value.name, **fields}
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]
    return value


def _from_plain(key: str, value: Any, registry: "Registry") -> Any:
    if isinstance(value, Mapping):
        fields = dict(value)
        slot, name = fields.pop("slot", key), fields.pop("stage", None)
        if name is None:
            raise ConfigError(f"{key}: expected a mapping with the key 'stage', got {dict(value)!r}")
        return registry.make_stage(slot, name, **{k: _from_plain(k, v, registry) for k, v in fields.items()})
    if isinstance(value, list):
        return tuple(_from_plain(key, item, registry) for item in value)
    return value
