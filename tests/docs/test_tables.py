"""Tables that the code writes: what is registered, its options, the settings of LouisKV, the promises of a policy.

Each stands in a page between two comments. After a change of the code:

    python tests/docs/test_tables.py
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import typer

from kvframe import errors, models
from kvframe.cli.app import app
from kvframe.cli.fields import field_notes
from kvframe.composition import Policy
from kvframe.eval.metrics import METRICS
from kvframe.eval.tasks import TASKS
from kvframe.pages import overview
from kvframe.plugins import create_plugin_manager
from kvframe.registry import PolicyRecord, Registry, StageRecord
from kvframe.report import LayerReport, Report
from kvframe.stages import SLOTS
from kvframe.types import Invariant

REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"

_TABLE = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end of table -->)", re.S)


def registry() -> Registry:
    """What kvframe's own distribution brings, whatever else is installed here."""
    return Registry(create_plugin_manager())


def shipped(record: PolicyRecord | StageRecord) -> bool:
    """Does kvframe's own distribution bring it?"""
    return record.plugin.distribution == "kvframe"


# ---- the tables -----------------------------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def code(text: object) -> str:
    """Text as code."""
    return f"`{text}`"


def default_of(field: "attrs.Attribute[Any]") -> str:
    """A field's default as code."""
    return "(needed)" if field.default is attrs.NOTHING else code(repr(field.default))


def paragraph(described: type[Any]) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(described) or "").partition("\n\n")[0].split())


def policies() -> str:
    """Every policy, with the line that says what it is."""
    return table(
        ("policy", "what it is", "published in", "comes from"),
        [
            (
                f"[{code(record.name)}](policies/{record.name}.md)",
                paragraph(record.config_cls),
                record.paper or "",
                code(record.plugin.module),
            )
            for record in registry().policies()
            if shipped(record)
        ],
    )


def stages(slot: str) -> str:
    """Every stage of a slot with its options."""
    rows = []
    for record in registry().stages(slot):
        if shipped(record):
            notes = field_notes(record.stage)
            options = [
                f"`{field.name}` = {default_of(field)}" + (f": {notes[field.name]}" if field.name in notes else "")
                for field in attrs.fields(record.stage)
            ]
            where = f"{record.stage.__module__.partition('.')[0]}.{record.stage.__name__}"
            rows.append((code(record.name), code(where), paragraph(record.stage), "<br>".join(options)))
    return table(("stage", "class", "what it does", "options"), rows)


def policy_fields() -> str:
    """What a policy is made of, besides its stages."""
    notes = field_notes(Policy) | {"name": "What reports call it."}
    return table(
        ("field", "default", "meaning"),
        [
            (code(field.name), default_of(field), notes[field.name])
            for field in attrs.fields(Policy)
            if field.name not in SLOTS
        ],
    )


def all_policies() -> str:
    """What each policy is like; `kvframe pages` writes the same."""
    return overview([record for record in registry().policies() if shipped(record)], "policies")


def scenarios() -> str:
    """The settings under which LouisKV was published."""
    names = ("louiskv-long-input", "louiskv-long-output", "louiskv-long-both")
    options = ("sink_size", "window_size", "tau", "token_budget")
    rows = []
    for name in names:
        config = registry().policy_spec(name).config_cls()
        rows.append((code(name), *(str(getattr(config, option)) for option in options)))
    return table(("policy", *map(code, options)), rows)


def promises() -> str:
    """What a policy can promise, and which of the shipped policies do not."""
    made = {record.name: record.make().promises for record in registry().policies() if shipped(record)}
    rows = []
    for invariant in Invariant:
        without = ", ".join(code(name) for name, kept in made.items() if invariant not in kept)
        rows.append((code(invariant.name), invariant.value, without or "all"))
    return table(("promise", "in words", "made by"), rows)


def tasks() -> str:
    """Every task with its options."""
    rows = []
    for name, made in TASKS.items():
        notes = field_notes(made)
        options = [
            f"`{field.name}` = {default_of(field)}" + (f": {notes[field.name]}" if field.name in notes else "")
            for field in attrs.fields(made)  # type: ignore[arg-type]  # every task is an attrs class
        ]
        rows.append((code(name), paragraph(made), "<br>".join(options)))
    return table(("task", "what it is", "options"), rows)


_NEEDS = {
    "forced": "the continuation under the policy",
    "shadow": "full attention, the policy watching",
    "generated": "a free generation",
}


def metrics() -> str:
    """Every figure, and the run that it is read from."""
    rows = [(code(metric.name), metric.summary, _NEEDS[metric.needs]) for metric in METRICS.values()]
    return table(("figure", "what it is", "read from"), rows)


def commands() -> dict[str, Any]:
    """The commands of the command line by name; those of a group come with its name in front."""
    return dict(_commands_of(typer.main.get_command(app)))


def _commands_of(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands_of(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


def command_options(name: str) -> str:
    """Arguments and options of a command."""
    rows = []
    for parameter in commands()[name].params:
        if parameter.param_type_name == "argument":
            given, default = code(parameter.name.upper()), "(needed)" if parameter.required else ""
        else:
            given = ", ".join(map(code, parameter.opts + parameter.secondary_opts))
            default = "" if parameter.default in (None, False) else code(parameter.default)
        rows.append((given, default, parameter.help or ""))
    return table(("argument or option", "default", "meaning"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "tasks": tasks,
    "metrics": metrics,
    "policies": policies,
    "overview": all_policies,
    "policy-fields": policy_fields,
    **{f"stages-{slot}": functools.partial(stages, slot) for slot in SLOTS},
    "scenarios": scenarios,
    "promises": promises,
    **{f"command-{name.replace(' ', '-')}": functools.partial(command_options, name) for name in commands()},
}


def places() -> Iterator[tuple[Path, str, str]]:
    """Every table of every page: the page, the table's name, and what stands there."""
    for page in sorted(DOCS.rglob("*.md")):
        for found in _TABLE.finditer(page.read_text(encoding="utf-8")):
            yield page, found["name"], found["body"]


def write() -> None:
    """Bring all pages up to date."""
    for page in sorted({page for page, _, _ in places()}):
        text = page.read_text(encoding="utf-8")
        renewed = _TABLE.sub(lambda found: f"{found['begin']}\n{TABLES[found['name']]()}\n{found['end']}", text)
        page.write_text(renewed, encoding="utf-8")


# ---- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page, name, body", [pytest.param(*place, id=f"{place[0].stem}-{place[1]}") for place in places()]
)
def test_table_is_up_to_date(page: Path, name: str, body: str) -> None:
    """A page shows what the code would write today."""
    assert body.strip() == TABLES[name]().strip(), f"run: python tests/docs/test_tables.py ({page.name})"


def test_every_table_has_a_place() -> None:
    """None is written for nobody."""
    assert {name for _, name, _ in places()} == set(TABLES)


def headings(page: str, level: int = 2) -> list[str]:
    """The headings of a page."""
    marks = "#" * level
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [line.removeprefix(marks).strip() for line in lines if line.startswith(f"{marks} ")]


def test_every_command_is_explained() -> None:
    """Each command has a heading in docs/cli.md, and no other has one."""
    headed = {heading.strip("`") for heading in headings("cli.md") if heading.startswith("`kvframe ")}

    assert headed == {f"kvframe {name}" for name in commands()}


def test_every_error_is_explained() -> None:
    """Each error that kvframe raises on purpose has a heading in docs/errors.md, and no other has one."""
    defined = {
        name
        for module in (errors, models)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, errors.KvframeError) and not name.startswith("_")
    }

    assert {heading.strip("`") for heading in headings("errors.md")} == defined


def test_every_field_of_the_report_is_explained() -> None:
    """The quickstart names each field of the report, of a layer's report, and none besides."""
    page = (DOCS / "quickstart.md").read_text(encoding="utf-8").partition("## The report, field by field")[2]
    explained = set(re.findall(r"^\| `(\w+)` \|", page.partition("\n## ")[0], re.M))
    fields = {field.name for kind in (Report, LayerReport) for field in attrs.fields(kind)}

    assert explained == fields


def test_louiskv_settings_have_the_options_of_louiskv() -> None:
    """So that one table serves all four."""
    known = {field.name for field in attrs.fields(registry().policy_spec("louiskv").config_cls)}
    for name in ("louiskv-long-input", "louiskv-long-output", "louiskv-long-both"):
        assert {field.name for field in attrs.fields(registry().policy_spec(name).config_cls)} == known


if __name__ == "__main__":
    write()
