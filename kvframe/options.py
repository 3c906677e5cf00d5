"""Options of stages and policies: by name in Python, and as `key=value` text on a command line."""

import math
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs

from kvframe.errors import ConfigError
from kvframe.suggest import hint

_T = TypeVar("_T")

_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def option_names(config_cls: type[Any]) -> tuple[str, ...]:
    """What `config_cls` can be given, in the order of its fields."""
    return tuple(_fields(config_cls))


def configure(config_cls: type[_T], options: Mapping[str, Any]) -> _T:
    """An instance of the attrs class `config_cls`; any complaint about `options` is a `ConfigError`."""
    fields = _fields(config_cls)
    for key in options:
        _require_known(config_cls, key)
    missing = [key for key, field in fields.items() if field.default is attrs.NOTHING and key not in options]
    if missing:
        raise ConfigError(f"{config_cls.__name__} needs {', '.join(missing)} (options: {', '.join(fields)})")
    try:
        return config_cls(**options)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        # attrs puts the field and the validator behind the sentence
        sentence = error.args[0] if error.args else error
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ConfigError(f"{config_cls.__name__}({given}): {sentence}") from error


def parse_options(config_cls: type[Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Options from texts such as `token_budget=1024`, each converted to the type that its field is annotated with.

    Understood are int, float, bool, str, None (`none`), literals, tuples of these (`dense_layers=0,1`; empty text for
    an empty one) and unions, of which the most specific member that fits is taken: `4` is an int for `int | str`.

    Raises:
        ConfigError: A text is not `key=value`, names no option or one twice, or its value does not fit the annotation.
    """
    hints: dict[str, Any] | None = None
    parsed: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(
                f"expected key=value, got {assignment!r} (options: {', '.join(option_names(config_cls))})"
            )
        _require_known(config_cls, key)
        if key in parsed:
            raise ConfigError(f"option {key!r} of {config_cls.__name__} is given twice; keep one")
        if hints is None:
            hints = _type_hints(config_cls)
        kind = hints.get(_fields(config_cls)[key].name)
        try:
            parsed[key] = _convert(kind, text)
        except ValueError:
            raise ConfigError(f"option {key!r} of {config_cls.__name__} must be {_words(kind)}, got {text!r}") from None
        except TypeError:
            raise ConfigError(
                f"option {key!r} of {config_cls.__name__} is of type {_words(kind)}, which text cannot give; "
                "set it in Python"
            ) from None
    return parsed


def _fields(config_cls: type[Any]) -> dict[str, "attrs.Attribute[Any]"]:
    return {field.alias or field.name: field for field in attrs.fields(config_cls) if field.init}


def _require_known(config_cls: type[Any], key: str) -> None:
    names = option_names(config_cls)
    if key not in names:
        raise ConfigError(f"{config_cls.__name__} has no option {key!r}{hint(key, names, 'options')}")


def _type_hints(config_cls: type[Any]) -> dict[str, Any]:
    try:
        return get_type_hints(config_cls)
    except NameError as error:
        raise ConfigError(
            f"the options of {config_cls.__name__} cannot be given as text: {error}; "
            f"import what {config_cls.__module__} annotates with outside of TYPE_CHECKING"
        ) from error


def _convert(kind: Any, text: str) -> Any:
    """`text` as a value of type `kind`; ValueError where it is none, TypeError where text never is."""
    if kind is str:
        return text
    text = text.strip()
    if kind is int:
        return int(text)
    if kind is float:
        value = float(text)
        if math.isnan(value):
            raise ValueError
        return value
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise ValueError
        return _BOOLS[text.lower()]
    if kind is NoneType:
        if text.lower() != "none":
            raise ValueError
        return None
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        for literal in arguments:
            if text == str(literal):
                return literal
        raise ValueError
    if origin is tuple:
        return _convert_tuple(arguments, text)
    if origin in (Union, UnionType):
        return _convert_union(arguments, text)
    raise TypeError


def _convert_tuple(kinds: tuple[Any, ...], text: str) -> tuple[Any, ...]:
    parts = [] if text in ("", "()") else text.removesuffix(",").split(",")
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(parts)
    if len(parts) != len(kinds):
        raise ValueError
    return tuple(_convert(kind, part.strip()) for kind, part in zip(kinds, parts, strict=True))


# A member of a union that would also take the texts of others comes after them.
_SPECIFIC_FIRST = (NoneType, Literal, int, float, bool, tuple, str)


def _convert_union(kinds: tuple[Any, ...], text: str) -> Any:
    textual = [kind for kind in kinds if _rank(kind) < len(_SPECIFIC_FIRST)]
    for kind in sorted(textual, key=_rank):
        try:
            return _convert(kind, text)
        except ValueError:
            continue
    raise ValueError if textual else TypeError


def _rank(kind: Any) -> int:
    shape = get_origin(kind) or kind
    return _SPECIFIC_FIRST.index(shape) if shape in _SPECIFIC_FIRST else len(_SPECIFIC_FIRST)


def _words(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is NoneType:
        return "none"
    if kind is bool:
        return "true or false"
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"{_words(arguments[0])} values separated by commas"
    if origin is tuple:
        return f"{len(arguments)} values separated by commas ({', '.join(map(_words, arguments))})"
    if origin in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    return getattr(kind, "__name__", str(kind))
