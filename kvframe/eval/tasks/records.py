"""Question/answer samples in a local file: JSON lines, or one JSON list, in the formats that are common.

- `ruler`: `input` (the whole prompt), `outputs`; perhaps `answer_prefix`. As RULER's scripts write them (2024, arXiv
  2404.06654).
- `longbench`: `context`, `input`, `answers`. LongBench (2023, arXiv 2308.14508).
- `infinitebench`: `context`, `input`, `answer`; perhaps `options`. InfiniteBench (2024, arXiv 2402.13718).
- `questions`: `question` or `problem`, and `answer`; perhaps `context`. GSM8K, MATH-500, AIME, and files of one's own.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from kvframe.errors import ConfigError

Format = Literal["ruler", "longbench", "infinitebench", "questions"]

FIELDS: dict[Format, tuple[tuple[str, ...], ...]] = {
    "ruler": (("input",), ("outputs",)),
    "longbench": (("context",), ("input",), ("answers",)),
    "infinitebench": (("context",), ("input",), ("answer",)),
    "questions": (("question", "problem"), ("answer",)),
}
"""The fields of each format that have to be there, each by the names that it may have."""

_FINAL = "####"
"""What GSM8K has between the reasoning and the answer."""


@frozen(kw_only=True)
class Record:
    """One question."""

    context: str
    """The text that the question is about; empty where there is none, or where the question holds it."""
    question: str
    options: tuple[str, ...] = ()
    """What to choose from, if anything."""
    answers: tuple[str, ...]
    """At least one."""
    prefix: str = ""
    """What the answer begins with, and is given."""


def read_records(path: str, wanted: Format | Literal["auto"]) -> "tuple[Format, Sequence[Record]]":
    """The samples of a file, and its format, which is that of its first sample where `wanted` is "auto".

    Raises ConfigError for a file that cannot be read or is empty, for fields that are of no known format, and for a
    sample that lacks a field or has one of another type.
    """
    file = Path(path)
    try:
        state = file.stat()
    except OSError as error:
        raise ConfigError(f"cannot read the samples in {path}: {error}") from error
    return _read(path, wanted, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: str, wanted: Format | Literal["auto"], changed: int, size: int) -> "tuple[Format, Sequence[Record]]":
    """Kept, because every cell of a study asks; a file that has changed is read again."""
    found = _parse(path)
    kind = _kind(path, found[0][1]) if wanted == "auto" else wanted
    return kind, tuple(_record(kind, f"{path}, {place}", data) for place, data in found)


def _parse(path: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Every object in the file, and where it stands."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            found = [(f"sample {number}", data) for number, data in enumerate(json.loads(text))]
        else:
            lines = enumerate(text.split("\n"), start=1)
            found = [(f"line {number}", _line(number, line)) for number, line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the samples in {path}: {error}; expected JSON lines, or a JSON list") from error
    for place, data in found:
        if not isinstance(data, dict):
            raise ConfigError(f"{path}, {place} is a {type(data).__name__}, expected an object with {_known()}")
    if not found:
        raise ConfigError(f"{path} has no samples; expected JSON lines with {_known()}")
    return found


def _line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error


def _kind(path: str, data: Mapping[str, Any]) -> Format:
    """The format that has all of its fields in a sample."""
    for kind, fields in FIELDS.items():
        if all(any(name in data for name in names) for names in fields):
            return kind
    raise ConfigError(f"{path} is in no format that is known: its fields are {', '.join(data)}; expected {_known()}")


def _known() -> str:
    return "; or ".join(f"{', '.join(map(' or '.join, fields))} ({kind})" for kind, fields in FIELDS.items())


def _record(kind: Format, where: str, data: Mapping[str, Any]) -> Record:
    values = []
    for names in FIELDS[kind]:
        name = next((name for name in names if name in data), None)
        if name is None:
            raise ConfigError(
                f"{where}: there is no field {' or '.join(map(repr, names))}, which a sample of format {kind!r} has; "
                f"there are {', '.join(data)}"
            )
        values.append((name, data[name]))
    *texts, (name, answer) = values
    context, question = ("", *texts)[-2:] if len(texts) == 1 else texts
    if kind == "questions" and "context" in data:
        context = ("context", data["context"])
    return Record(
        context=_text(where, *context) if context else "",
        question=_text(where, *question),
        options=_options(where, data),
        answers=_answers(where, name, answer),
        prefix=_text(where, "answer_prefix", data["answer_prefix"]) if "answer_prefix" in data else "",
    )


def _text(where: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name!r} must be a text, got {value!r}")
    return value


def _options(where: str, data: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a list, or of fields `choice_A` and so on."""
    given = data.get("options") or [data[f"choice_{letter}"] for letter in "ABCD" if f"choice_{letter}" in data]
    if not isinstance(given, list):
        raise ConfigError(f"{where}: 'options' must be a list of texts, got {given!r}")
    return tuple(_text(where, "options", option) for option in given)


def _answers(where: str, name: str, value: object) -> tuple[str, ...]:
    """One or several, numbers as text; of an answer with its reasoning the end."""
    given = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in given):
        raise ConfigError(f"{where}: {name!r} must be a text, a number, or a list of them, got {value!r}")
    found = tuple(text for one in given if (text := str(one).rpartition(_FINAL)[2].strip()))
    if not found:
        raise ConfigError(f"{where}: {name!r} holds no answer, got {value!r}")
    return found
