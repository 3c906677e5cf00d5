"""`kvframe matrix`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import Result

Run = Callable[..., Result]


def test_matrix(run_json: Callable[..., Any], tmp_path: Path) -> None:
    """Every swap with what became of it, and a page."""
    page = tmp_path / "swaps.md"
    found = run_json("matrix", "--base", "oracle_topk", "--distribution", "kvframe", "--markdown", page)

    assert found["base"] == "oracle_topk"
    assert {row["outcome"] for row in found["swaps"]} <= {"runs", "refused"}
    rows = {(row["policy"], row["slot"], row["stage"]): row for row in found["swaps"]}
    assert "quest" in rows["oracle_topk", "scorer", "bounding-box"]["used_by"]
    assert rows["quest", "units", "tokens"]["rows_recalled"] > 0
    assert re.search(r"\| scorer \| `bounding-box` \| .*`quest`.* \| runs \|", page.read_text(encoding="utf-8"))


def test_matrix_of_no_policy(fails: Callable[..., str]) -> None:
    """A base that is not there is one clean error."""
    assert "no policy named 'louis'" in fails("matrix", "--base", "louis")
