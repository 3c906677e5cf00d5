"""`kvframe list`: what there is, and where it comes from."""

from typing import TYPE_CHECKING, Annotated, Any

import attrs
import typer
from rich.table import Table

from kvframe.cli.console import out, print_json

if TYPE_CHECKING:
    from kvframe.registry import PolicyRecord

JSON = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
DISTRIBUTION = Annotated[
    str | None, typer.Option(help="Only what this distribution brings, such as kvframe; all that is installed without.")
]


def list_(json: JSON = False) -> None:
    """Policies, stages and plugins, with the distribution and version that each comes from."""
    from kvframe.registry import default_registry

    registry = default_registry()
    stages = [
        {"slot": record.slot, "name": record.name, "summary": record.summary, "paper": record.paper}
        | source_of(record.plugin)
        for record in registry.stages()
    ]
    policies = [_policy_row(record) for record in registry.policies()]
    plugins = registry.plugins.describe()
    if json:
        print_json({"policies": policies, "stages": stages, "plugins": plugins})
        return
    console = out()
    console.print(_table("Policies", ("name", "from", "summary"), [_cells(row) for row in policies]))
    console.print()
    console.print(_table("Stages", ("slot", "name", "from", "summary"), [_cells(row) for row in stages]))
    console.print()
    console.print(_table("Plugins", ("name", "module", "from", "hooks"), [_plugin_cells(row) for row in plugins]))


def _policy_row(record: "PolicyRecord") -> dict[str, Any]:
    from kvframe.traits import traits_of

    row = {"name": record.name, "summary": record.summary, "paper": record.paper}
    row |= {"title": record.spec.title, "year": record.spec.year} | source_of(record.plugin)
    return row | {"traits": None if record.needs else attrs.asdict(traits_of(record.make())), "needs": record.needs}


def source_of(plugin: Any) -> dict[str, Any]:
    """Where something comes from, as plain data."""
    return {"plugin": plugin.name, "distribution": plugin.distribution, "version": plugin.version}


def _cells(row: dict[str, Any]) -> dict[str, str]:
    source = f"{row['plugin']} ({row['distribution']} {row['version']})"
    return {**row, "from": source, "summary": row["summary"] + (f" ({row['paper']})" if row["paper"] else "")}


def _plugin_cells(row: dict[str, Any]) -> dict[str, str]:
    hooks = ", ".join(row["hooks"]) if row["enabled"] else "left out by KVFRAME_DISABLE_PLUGINS"
    return {**row, "from": f"{row['distribution']} {row['version']}", "hooks": hooks}


def _table(title: str, columns: tuple[str, ...], rows: list[dict[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column not in ("summary", "hooks"))
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table
