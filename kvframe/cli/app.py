"""All commands under one name, and what becomes of their errors."""

from typing import Any

import typer
from typer.core import TyperGroup

from kvframe.cli.ablate import ablate
from kvframe.cli.bench import bench
from kvframe.cli.calibrate import calibrate
from kvframe.cli.compare import compare
from kvframe.cli.console import errors, out
from kvframe.cli.demo import demo
from kvframe.cli.doctor import doctor
from kvframe.cli.evaluate import evaluate
from kvframe.cli.families import families
from kvframe.cli.generate import generate
from kvframe.cli.listing import list_
from kvframe.cli.matrix import matrix
from kvframe.cli.pages import pages
from kvframe.cli.plan import plan
from kvframe.cli.replay import replay
from kvframe.cli.show import show
from kvframe.cli.trace import trace
from kvframe.errors import KvframeError


class Commands(TyperGroup):
    """The commands. An error that kvframe raises on purpose becomes one line and exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--debug` may stand anywhere."""
        if "--debug" in args:
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except KvframeError as error:
            if ctx.params.get("debug"):
                raise
            errors.print(f"error: {error}", markup=False, soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="kvframe",
    cls=Commands,
    help="KV retrieval for long-context decoding, as policies of five stages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    demo, generate, show, plan, calibrate, compare, ablate, trace, replay, doctor, families, matrix, pages,
):  # fmt: skip
    app.command()(command)
app.command(name="eval")(evaluate)
app.command(name="list")(list_)
app.add_typer(bench)


def _print_version(wanted: bool) -> None:
    if wanted:
        from kvframe import __version__

        out().print(f"kvframe {__version__}", markup=False)
        raise typer.Exit


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(False, "--version", help="Show the version.", is_eager=True, callback=_print_version),
) -> None:
    """KV retrieval for long-context decoding, as policies of five stages."""


def main() -> None:
    """Run the command line."""
    app()
