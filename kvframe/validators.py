"""Validators for stage and policy fields; each raises ConfigError with what was expected and what came."""

from collections.abc import Callable
from typing import Any

import attrs

from kvframe.errors import ConfigError, SlotError

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _where(instance: Any, attribute: "attrs.Attribute[Any]") -> str:
    return f"{type(instance).__name__}.{attribute.name}"


def integer(*, at_least: int, or_none: bool = False) -> Validator:
    """An int, not a bool, of at least this size; with `or_none` None as well."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if or_none and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            wanted = f"an integer >= {at_least}" + (" or None" if or_none else "")
            raise ConfigError(f"{_where(instance, attribute)} must be {wanted}, got {value!r}")

    return check


def one_of(*choices: Any) -> Validator:
    """One of a few values."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            known = ", ".join(repr(choice) for choice in choices)
            raise ConfigError(f"{_where(instance, attribute)} must be one of {known}; got {value!r}")

    return check


def part(slot_cls: type[Any]) -> Validator:
    """A stage of a slot, as part of another stage; raises SlotError."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, slot_cls):
            raise SlotError(f"{_where(instance, attribute)} must be a {slot_cls.__name__}, got {value!r}")

    return check


def finite_number(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    """An int or float that is neither NaN nor infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
        raise ConfigError(f"{_where(instance, attribute)} must be a finite number, got {value!r}")


def odd(instance: Any, attribute: "attrs.Attribute[Any]", value: int) -> None:
    """An odd number."""
    if value % 2 == 0:
        raise ConfigError(f"{_where(instance, attribute)} must be odd, got {value!r}")


def share(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{_where(instance, attribute)} must be a number from 0 to 1, got {value!r}")


def integers(*, at_least: int) -> Validator:
    """A tuple of ints, none of them a bool, of at least this size each; it may be empty."""

    def check(instance: Any, attribute: "attrs.Attribute[Any]", value: Any) -> None:
        if not isinstance(value, tuple) or not all(type(item) is int and item >= at_least for item in value):
            raise ConfigError(f"{_where(instance, attribute)} must be a tuple of integers >= {at_least}, got {value!r}")

    return check
