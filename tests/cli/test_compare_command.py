"""`kvframe compare` on a tiny random model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.words import TEXT
from typer.testing import Result

from kvframe.eval.compare import POLICIES

Run = Callable[..., Result]
RunJson = Callable[..., Any]
Fails = Callable[..., str]


@pytest.fixture
def call(tiny_model: Path, tmp_path: Path) -> tuple[object, ...]:
    """The command on a few thousand words of text."""
    words = TEXT.split()
    text = "\n\n".join(" ".join(words[i % 20 :] + words[: i % 20]) for i in range(60))
    (tmp_path / "words.txt").write_text(text)
    sizes = ("--context", 600, "--needles", 2, "--copy-tokens", 10, "--sinks", 8, "--window", 16)
    return ("compare", "--model", tiny_model, "--text", tmp_path / "words.txt", *sizes)


def test_each_figure_is_kept(call: tuple[object, ...], run: Run, tmp_path: Path) -> None:
    """As a line of text, as a line of JSON, and in the tables."""
    figures, page = tmp_path / "figures.jsonl", tmp_path / "page.md"
    result = run(*call, "--policies", "oracle_topk,window", "--budgets", "64", "--output", figures, "--markdown", page)
    lines = [json.loads(line) for line in figures.read_text().splitlines()]
    shown = [line for line in result.stdout.splitlines() if " KL " in line]

    assert len(lines) == 2 * 2 * 2 == len(shown)
    for found, text in zip(lines, shown):
        line = found["row"]
        assert found["conditions"]["haystack"] == "words.txt" and found["conditions"]["context"] == 600
        assert text.split()[:4] == [line["task"], line["trigger"], "64", line["policy"]]
        assert f"KL {line['kl']:.4f} " in text
        assert f"| {line['policy']} | {line['kl']:.4f} |" in page.read_text()


def test_figures_of_several_files(call: tuple[object, ...], run: Run, run_json: RunJson, fails: Fails, tmp_path: Path):
    """Made one by one they give the tables that they give together; nothing runs, and nothing else is mixed in."""
    files = [tmp_path / name for name in ("one", "other", "odd")]
    common = (*call, "--budgets", "64", "--tasks", "copy", "--triggers", "own")
    together = run_json(*common, "--policies", "oracle_topk,window")
    for policy, path in zip(("oracle_topk", "window"), files):
        run(*common, "--policies", policy, "--output", path)
    run(*common, "--policies", "window", "--output", files[2], "--seed", 1)

    assert run_json("compare", "--from", files[0], "--from", files[1])["rows"] == together["rows"]
    assert "figures of different conditions" in fails("compare", "--from", files[0], "--from", files[2])
    files[1].write_text('{"row": {}}\n')
    files[2].write_text("")
    for path, reason in ((files[1], "KeyError"), (tmp_path / "none", "No such file"), (tmp_path / "words.txt", "JSON")):
        message = fails("compare", "--from", path)
        assert "cannot read figures from" in message and reason in message
    assert "there are no figures" in fails("compare", "--from", files[2])


def test_a_calibrated_trigger(call: tuple[object, ...], run: Run, run_json: RunJson, fails: Fails, tmp_path: Path):
    """Its table says what it was calibrated to; figures made elsewhere say where."""
    found, own, calibrated, page = (tmp_path / name for name in ("found.json", "own", "calibrated", "page.md"))
    common = (*call, "--budgets", "64", "--tasks", "copy", "--policies", "louiskv")
    run("calibrate", call[2], "--text-file", call[4], "--rate", 0.4, "--tokens", 200, "--output", found)
    run(*common, "--triggers", "own", "--output", own)
    run(*common, "--triggers", "calibrated", "--calibration", found, "--output", calibrated)
    line = json.loads(calibrated.read_text())
    line["environment"]["torch"] = "another"
    calibrated.write_text(json.dumps(line) + "\n")
    rows = run_json("compare", "--from", calibrated, "--from", own, "--markdown", page)["rows"]

    assert [(row["trigger"], row["wanted_rate"]) for row in rows] == [("own", None), ("calibrated", 0.4)]
    assert rows[0]["retrieval_rate"] != rows[1]["retrieval_rate"]
    text = page.read_text()
    assert "by its own trigger, calibrated to 40%" in text
    assert text.count("torch another") == 1
    assert fails(*common, "--triggers", "calibrated").count("--calibration FILE") == 1


def test_json(call: tuple[object, ...], run_json: RunJson) -> None:
    """One object, with what it was made under; competitors that are not installed are named."""
    found = run_json(*call, "--budgets", "64", "--tasks", "copy", "--triggers", "own")

    assert {row["policy"] for row in found["rows"]} | set(found["not_installed"]) == set(POLICIES)
    assert found["conditions"]["copy_tokens"] == 10 and found["environment"]["torch"]


def test_what_goes_wrong(call: tuple[object, ...], fails: Fails, tmp_path: Path) -> None:
    """One line each, before anything has run."""
    assert "--budgets must be whole numbers separated by commas, got 'many'" in fails(*call, "--budgets", "many")
    assert "--triggers must be one of every-step, own, calibrated; got 'mine'" in fails(*call, "--triggers", "mine")
    assert "there is no directory" in fails(*call, "--output", tmp_path / "no" / "file")
    assert "no policy named 'louskv'; did you mean 'louiskv'" in fails(*call, "--policies", "louskv")
    assert "the context has 9000 tokens, the model reads at most 2048" in fails(*call, "--context", 9000)
    assert "needs a context of at least" in fails(*call, "--context", 30)
