"""`kvframe trace` and `kvframe replay` on a tiny random model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.words import TEXT
from typer.testing import Result

Run = Callable[..., Result]
RunJson = Callable[..., Any]
Fails = Callable[..., str]


@pytest.fixture
def call(tiny_model: Path, tmp_path: Path) -> tuple[object, ...]:
    """`kvframe trace` of a short copy in a few thousand words of text."""
    words = TEXT.split()
    text = "\n\n".join(" ".join(words[i % 20 :] + words[: i % 20]) for i in range(60))
    (tmp_path / "words.txt").write_text(text)
    task = ("--task", "copy", "--set", "copy_tokens=12", "--text", tmp_path / "words.txt")
    return ("trace", tmp_path / "trace", "--model", tiny_model, *task, "--context", 500)


SIZES = ("--set", "sink_size=4", "--set", "window_size=16", "--set", "dense_layers=")


def test_record_and_replay(call: tuple[object, ...], run_json: RunJson, run: Run, tiny_model: Path, tmp_path: Path):
    """The variants asked for, in the table, as JSON and as lines of a file; the same in one process and in two."""
    made = run_json(*call, "--layers", "1,3")
    variants = ("--policies", "oracle_topk,louiskv", *SIZES, "--vary", "token_budget=16,64", "--vary", "tau=0.2,0.9")
    found = run_json("replay", tmp_path / "trace", *variants, "--model", tiny_model, "--output", tmp_path / "lines")
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    shown = run("replay", tmp_path / "trace", *variants, "--jobs", 2).stdout.splitlines()
    labels = [f"{name} token_budget={n}" for name in ("oracle_topk",) for n in (16, 64)]
    labels += [f"louiskv token_budget={n} tau={tau}" for n in (16, 64) for tau in (0.2, 0.9)]

    assert made["layers"] == [1, 3] and made["turns"] == [[487, 12]] and made["bytes"] > 0
    assert [row["label"] for row in found["policies"]] == labels and found["policies"] == lines
    assert found["policies"][1]["captured_mass"] > found["policies"][0]["captured_mass"]
    for row, text in zip(found["policies"], shown[1:], strict=True):
        assert text.startswith(row["label"]) and f"{row['captured_mass']:.1%}" in text


def test_what_it_says(call: tuple[object, ...], run: Run, tmp_path: Path):
    """Without --json."""
    assert run(*call).stdout == (
        f"layers 0, 1, 2, 3 over 499 tokens, 12 of them decode steps: 0.5 MiB in {tmp_path / 'trace'}\n"
    )


def test_what_goes_wrong(call: tuple[object, ...], run: Run, fails: Fails, tmp_path: Path) -> None:
    """One line each."""
    assert "no task 'copi'; did you mean 'copy'" in fails("trace", tmp_path / "x", "--task", "copi")
    assert "Copy has no option 'tokens'" in fails(*call, "--set", "tokens=3")
    assert "task copy has 9000 tokens, the model reads at most 2048" in fails(*call[:-1], 9000)
    assert "GiB are allowed; record fewer layers, or allow more" in fails(*call, "--max-gib", "0.00001")
    assert "there is no directory" in fails("trace", tmp_path / "no" / "x")
    assert "cannot read the trace" in fails("replay", tmp_path / "nothing")
    run(*call)
    replay = ("replay", tmp_path / "trace")
    assert "none of the policies louiskv has an option 'taw'; did you mean 'tau'" in fails(
        *replay, "--policies", "louiskv", "--vary", "taw=1"
    )
    assert "--vary must be KEY=VALUE,VALUE, got 'tau'" in fails(*replay, "--vary", "tau")
    assert "dense_layers names layer 9" in fails(*replay, "--policies", "louiskv", "--set", "dense_layers=9")
