"""`kvframe show`: one policy, taken apart."""

from typing import Annotated, Any

import attrs
import typer

from kvframe.cli.console import out, print_json
from kvframe.cli.fields import field_default, field_notes
from kvframe.cli.listing import JSON, source_of

POLICY = Annotated[str, typer.Option(help="Name of a policy, as `kvframe list` gives it.")]
SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the policy; may be given several times."),
]


def show(
    policy: Annotated[str, typer.Argument(help="Name of a policy, as `kvframe list` gives it.")],
    set_: SET = None,
    json: JSON = False,
) -> None:
    """A policy's stages with all their fields, its sizes, its options and what it promises."""
    from kvframe.composition import Policy
    from kvframe.options import parse_options
    from kvframe.registry import default_registry

    record = default_registry().policy_spec(policy)
    made = record.make(**parse_options(record.config_cls, set_ or []))
    # An option that is handed through to the policy means there what it says there.
    notes = field_notes(Policy) | field_notes(record.config_cls)
    options = [
        {
            "name": field.alias or field.name,
            "default": field_default(field),
            "required": field.default is attrs.NOTHING,
            "help": notes.get(field.name),
        }
        for field in attrs.fields(record.config_cls)
        if field.init
    ]
    if json:
        print_json(
            {
                "name": record.name,
                "summary": record.summary,
                "paper": record.paper,
                **source_of(record.plugin),
                "policy": made.to_dict(),
                "tokens": {
                    "sinks": made.sink_size,
                    "retrieved": made.selector.capacity,
                    "window": made.window_size,
                    "total": made.sink_size + made.selector.capacity + made.window_size,
                },
                "promises": {invariant.name: invariant.value for invariant in made.promises},
                "options": options,
            }
        )
        return
    console = out()
    console.print(f"{record.summary}", markup=False)
    console.print(f"{record.paper or 'no paper'}; from {record.plugin}\n", markup=False)
    console.print(str(made), markup=False)
    console.print("\nOptions (--set key=value), with their defaults:")
    for option in options:
        console.print(_option_line(option), markup=False)
    console.print("\nPromises:")
    for invariant in made.promises:
        console.print(f"  - {invariant.value}", markup=False)


def _option_line(option: dict[str, Any]) -> str:
    value = f"  {option['name']}" + (" (required)" if option["required"] else f" = {option['default']!r}")
    return f"{value:<34}  {option['help']}" if option["help"] else value
