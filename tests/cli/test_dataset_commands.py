"""Samples of a local file on the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval.studies import save_tiny_model

import kvframe
from kvframe.eval import evaluate, task

RunJson = Callable[..., Any]
Fails = Callable[..., str]

SAMPLES = [{"context": f"{number} {60 * 'x '}", "input": "What?", "answers": ["an x"]} for number in range(3)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three samples as LongBench has them."""
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES))
    return tmp_path / "set.jsonl"


def test_eval_command(tmp_path: Path, path: Path, run_json: RunJson, fails: Fails) -> None:
    """All samples, or the first few, their means those of `evaluate`; without lm-eval."""
    model = save_tiny_model(tmp_path / "model")
    call = ("eval", model, "--dataset", path, "--dataset-set", "max_new_tokens=4", "--policy", "window",
            "--set", "window_size=8", "--set", "sink_size=4", "--dtype", "float32")  # fmt: skip
    found = run_json(*call)
    from kvframe.cli.models import load

    loaded, tokenizer = load(str(model), "float32", quiet=True)
    policy = kvframe.policy("window", window_size=8, sink_size=4)
    alone = [
        evaluate(loaded, tokenizer, policy, task("dataset", path=path), context=1024, seed=seed, metrics=["kl"])["kl"]
        for seed in range(3)
    ]

    assert found["samples"] == 3 and found["dataset"]["path"].startswith("set.jsonl (sha256 ")
    assert (
        found["results"]["set"]["kl,none"] == pytest.approx(sum(alone) / 3) and found["results"]["set"]["kl,none"] > 0
    )
    assert run_json(*call, "--limit", 1)["per_sample"] == found["per_sample"][:1]
    assert "expected one of --tasks" in fails("eval", model)
    assert "100 are allowed" in fails(*call, "--context", 100)


def test_compare_command(tmp_path: Path, path: Path, run_json: RunJson, fails: Fails) -> None:
    """Beside the tasks that are always there, or alone."""
    model = save_tiny_model(tmp_path / "model")
    call = ("compare", "--model", model, "--policies", "window", "--budgets", 16, "--window", 8, "--sinks", 4,
            "--dense-layers", "0", "--context", 400, "--triggers", "own", "--tasks", "")  # fmt: skip
    found = run_json(*call, "--dataset", path)

    assert [row["task"] for row in found["rows"]] == ["dataset"] and found["rows"][0]["kl"] > 0
    assert found["conditions"]["dataset"] == "set.jsonl"
    assert "there is no --dataset" in fails(*call)
