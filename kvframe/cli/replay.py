"""`kvframe replay`: any policy on a trace, without the model."""

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvframe.cli.compare import append_line
from kvframe.cli.console import errors, out, print_json, progress
from kvframe.cli.listing import JSON
from kvframe.errors import ConfigError
from kvframe.suggest import hint

if TYPE_CHECKING:
    from kvframe.composition import Policy


def replay(
    trace: Annotated[Path, typer.Argument(help="What `kvframe trace` wrote.")],
    policies: Annotated[
        str, typer.Option(help="Names of policies, separated by commas.")
    ] = "oracle_topk,louiskv,window",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of every policy that has it; may be repeated."),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE", help="An option with several values, all of which are tried; may be repeated."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes to share the policies among.")] = 1,
    model: Annotated[
        str | None,
        typer.Option(help="Make sure that the trace is of this model, and fit policies to its vocabulary."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Append each policy's figures there as a line of JSON, as soon as they exist.")
    ] = None,
    json: JSON = False,
) -> None:
    """Captured mass, recall, output error, selections, bytes and step time of policies on a trace."""
    from kvframe.eval.replaying import replay as run_replay
    from kvframe.eval.trace import load_trace

    wanted = list(variants([name.strip() for name in policies.split(",")], set_ or [], vary or []))
    recorded = load_trace(trace)
    if model is not None:
        from kvframe.cli.models import load

        loaded, tokenizer = load(model, quiet=json)
        recorded.check_model(loaded)
        wanted = [(label, policy.fitted(tokenizer)) for label, policy in wanted]
    rows = []
    with progress(f"replaying {len(wanted)} policies", quiet=json) as bar:
        for (label, _), found in zip(
            wanted, run_replay(trace, [policy for _, policy in wanted], jobs=jobs, progress=bar.update), strict=True
        ):
            rows.append({"label": label} | found.to_dict())
            if output is not None:
                append_line(output, rows[-1])
    if json:
        print_json({"trace": str(trace), "model": recorded.model, "policies": rows})
        return
    where = f"{recorded.model}, layers {', '.join(str(layer.layer_idx) for layer in recorded.layers)}"
    errors.print(f"{where}, {recorded.num_tokens:,} tokens, {recorded.num_steps} decode steps", markup=False)
    console, table = out(), _table(rows)
    console.width = max(console.width, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def variants(names: Sequence[str], fixed: Sequence[str], varied: Sequence[str]) -> "Iterator[tuple[str, Policy]]":
    """Every policy with every combination of the values that its options are given, and what to call it."""
    from kvframe.options import option_names, parse_options
    from kvframe.registry import default_registry

    records = [default_registry().policy_spec(name) for name in names]
    choices = [[assignment] for assignment in fixed] + [_each(assignment) for assignment in varied]
    known = {option for record in records for option in option_names(record.config_cls)}
    for key in (_key(choice[0]) for choice in choices):
        if key not in known:
            raise ConfigError(
                f"none of the policies {', '.join(names)} has an option {key!r}{hint(key, sorted(known))}"
            )
    for record in records:
        options = option_names(record.config_cls)
        own = [choice for choice in choices if _key(choice[0]) in options]
        for assignments in product(*own):
            policy = record.make(**parse_options(record.config_cls, assignments))
            label = " ".join([record.name, *(assignment for assignment in assignments if assignment not in fixed)])
            yield label, policy


def _each(assignment: str) -> list[str]:
    """`key=1,2` as `key=1` and `key=2`."""
    key, equals, values = assignment.partition("=")
    if not equals or not values:
        raise ConfigError(f"--vary must be KEY=VALUE,VALUE, got {assignment!r}")
    return [f"{key}={value}" for value in values.split(",")]


def _key(assignment: str) -> str:
    return assignment.partition("=")[0].strip()


_COLUMNS = {
    "captured_mass": ("captured", ".1%"),
    "oracle_mass": ("oracle", ".1%"),
    "oracle_recall": ("recall", ".1%"),
    "output_error": ("output error", ".4f"),
    "retrieval_rate": ("selects", ".1%"),
    "hit_rate": ("hits", ".1%"),
    "attended_total": ("attended", ",.0f"),
    "bytes_per_token": ("bytes/token", ",.0f"),
    "step_seconds": ("step s", ".2e"),
}


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for heading, _ in _COLUMNS.values():
        table.add_column(heading, no_wrap=True, justify="right")
    for row in rows:
        cells = ("-" if row[name] is None else format(row[name], spec) for name, (_, spec) in _COLUMNS.items())
        table.add_row(row["label"], *cells)
    return table
