"""The numbers of a study as files: CSV always, Parquet where pyarrow is installed."""

import csv
import importlib.util
import json
from pathlib import Path
from typing import Any

from kvframe.eval.figures import scalars
from kvframe.eval.running import Results

_PLACE = ("key", "label", "slot", "task", "context", "budget", "seed", "error", "seconds")


def flat_rows(results: Results) -> list[dict[str, Any]]:
    """A row for every cell that has an end, a column for every figure that is one number."""
    rows: list[dict[str, Any]] = []
    for cell in results.cells:
        outcome = results.outcome(cell)
        if cell.kind != "score" or outcome is None:
            continue
        rows.append(
            {
                "key": cell.key,
                "label": cell.label,
                "slot": cell.slot,
                "task": results.task_title(cell),
                "context": cell.context,
                "budget": cell.budget,
                "seed": cell.seed,
                "error": outcome.reason or None,
                "seconds": outcome.seconds,
                **scalars(outcome.figures or {}),
                "policy": json.dumps(cell.policy.to_dict(), sort_keys=True),
            }
        )
    return rows


def write_tables(results: Results, folder: Path) -> list[Path]:
    """Write every cell's figures; returns what was written."""
    rows = flat_rows(results)
    names = list(_PLACE) + [
        name for name in dict.fromkeys(name for row in rows for name in row) if name not in (*_PLACE, "policy")
    ]
    columns = [*names, "policy"]
    written = [folder / "results.csv"]
    with written[0].open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    if importlib.util.find_spec("pyarrow") is not None:
        written.append(folder / "results.parquet")
        _write_parquet(rows, columns, written[1])
    return written


def _write_parquet(rows: list[dict[str, Any]], columns: list[str], path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({name: [row.get(name) for row in rows] for name in columns})
    pyarrow.parquet.write_table(table, path)
