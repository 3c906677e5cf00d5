"""The result for people: a table on the terminal, and a page of the documentation."""

import textwrap
from collections import Counter
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from kvframe.matrix.outcome import Outcome, Verdict
from kvframe.matrix.swaps import SIZES, Swaps
from kvframe.matrix.trial import TURNS
from kvframe.stages import SLOTS

_STYLES = {
    Verdict.RUNS: "green",
    Verdict.REFUSED: "yellow",
    Verdict.ERROR: "bold red",
    Verdict.DIFFERENT: "bold red",
}


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many ended how."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict)


def terminal_table(outcomes: Sequence[Outcome]) -> Table:
    """A row a swap."""
    table = Table(caption=summary(outcomes), caption_justify="left")
    for name in ("policy", "slot"):
        table.add_column(name, no_wrap=True)
    table.add_column("stage", overflow="fold")
    table.add_column("outcome", no_wrap=True)
    table.add_column("", overflow="fold")
    for outcome in outcomes:
        swap, verdict = outcome.swap, outcome.verdict
        detail = outcome.reason or f"{outcome.selections} selections, {outcome.rows_recalled} rows recalled"
        state = Text(verdict, style=_STYLES[verdict])
        table.add_row(swap.policy.name, swap.slot, swap.label, state, Text(detail))
    return table


def markdown_page(swaps: Swaps, outcomes: Sequence[Outcome]) -> str:
    """The page `docs/results/swaps.md`."""
    base = swaps.base.name
    sizes = ", ".join(f"`{name}={value}`" for name, value in SIZES.items())
    steps = ", then ".join(f"{generated} steps after {read} tokens" for read, generated in TURNS)
    into_base = outcomes[: len(swaps.into_base)]
    from_base = outcomes[len(swaps.into_base) :]
    about = (
        f"Written by `kvframe matrix --base {base} --markdown`. Each line is a composition that was made, and run on "
        f"random keys and queries without a model: two sequences, one of them padded, {steps}. Policies and stages "
        f"have {sizes}, where they have the option. *Runs* means that `offload` attended in every step to the tokens "
        "that `dense` attends to, and gave the same output in float64. *Refused* means that kvframe said why before "
        "anything ran."
    )
    lines = [
        "# Stage swaps",
        "",
        textwrap.fill(about, 120, break_on_hyphens=False),
        "",
        f"{len(outcomes)} swaps: {summary(outcomes)}.",
        "",
        f"## Every stage in the place of that of `{base}`",
        "",
        "Options that are not a stage's defaults stand behind its name.",
        "",
        "| slot | stage | used by | outcome |",
        "| --- | --- | --- | --- |",
    ]
    for outcome in into_base:
        swap = outcome.swap
        used_by = ", ".join(f"`{name}`" for name in swap.used_by)
        lines.append(f"| {swap.slot} | `{swap.label}` | {used_by} | {_words(outcome)} |")
    lines += [
        "",
        f"## The stages of `{base}` in every other policy that retrieves",
        "",
        "A dash: the policy has that stage already.",
        "",
        f"| policy | {' | '.join(SLOTS)} |",
        f"| --- {'| --- ' * len(SLOTS)}|",
    ]
    by_policy: dict[str, dict[str, Outcome]] = {}
    for outcome in from_base:
        by_policy.setdefault(outcome.swap.policy.name, {})[outcome.swap.slot] = outcome
    for name, found in by_policy.items():
        cells = [_words(found[slot]) if slot in found else "–" for slot in SLOTS]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _words(outcome: Outcome) -> str:
    text = f"{outcome.verdict}: {outcome.reason}" if outcome.reason else str(outcome.verdict)
    return text.replace("|", "&#124;")
