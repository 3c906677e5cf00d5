"""What the source says about the fields of an attrs class."""

import ast
import inspect
import textwrap
from typing import Any

import attrs


def field_notes(config_cls: type[Any]) -> dict[str, str]:
    """The string below each field, of the class or of a base; fields without one, or without source, are left out."""
    notes: dict[str, str] = {}
    for base in reversed(config_cls.__mro__):
        if attrs.has(base):
            notes |= _own_notes(base)
    return notes


def field_default(field: "attrs.Attribute[Any]") -> Any:
    """A field's default as plain data."""
    if field.default is attrs.NOTHING:
        return None
    factory = getattr(field.default, "factory", None)
    return f"{factory.__name__}()" if factory is not None else field.default


def _own_notes(config_cls: type[Any]) -> dict[str, str]:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    if not isinstance(definition, ast.ClassDef):
        return {}
    notes = {}
    for statement, below in zip(definition.body, definition.body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                notes[statement.target.id] = " ".join(str(below.value.value).split())
    return notes
