"""`kvframe bench` on a CPU: tiny runs of what can run there, and one clean line for what cannot."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from kvframe.cli.app import app

SMALL = ("--token-budget", "64", "--sink-size", "4", "--window-size", "16")
CPU = ("--device", "cpu", "--model-shape", "tiny")


@pytest.fixture(autouse=True)
def narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is shown in full in whatever terminal."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def run(*arguments: object, code: int = 0) -> Result:
    """A command in this process, with its exit code checked."""
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*arguments: object) -> str:
    """The one line of a command that kvframe refuses."""
    lines = run(*arguments, code=2).stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and sum("error" in line for line in lines) == 1
    return lines[-1]


def read(path: Path) -> Any:
    """A result, with the keys that every one has."""
    found = json.loads(path.read_text())
    assert list(found) == ["benchmark", "environment", "conditions", "figures", "ratios", "notes"]
    assert {"device", "torch", "triton", "transformers", "date"} <= set(found["environment"])
    return found


def test_decode(tmp_path: Path) -> None:
    """Forced rates come out as asked, window attends to as much as LouisKV, and ratios are those of the means."""
    path = tmp_path / "decode.json"
    policies = "louiskv,louiskv@0,louiskv@1,window,quest,louiskv-plus@1,dynamic-cache,offloaded-cache"
    shown = run(
        "decode", *CPU, *SMALL, "--policies", policies, "--context", 1500, "--prefill-chunk", 256, "--steps", 25,
        "--warmup", 2, "--stock-steps", 3, "--fire-rate", 0.2, "--miss", 0.25, "--json", path,
    )  # fmt: skip
    found = read(path)
    rows = {row["name"]: row for row in found["figures"]}

    assert list(rows) == policies.split(",")
    assert [rows[name]["retrieval_rate"] for name in policies.split(",")[:6]] == pytest.approx([0.2, 0, 1, 0, 1, 1])
    missing = [rows[name]["miss_rate"] for name in ("louiskv@1", "quest", "louiskv-plus@1")]
    assert missing == pytest.approx([0.25] * 3, abs=0.06)
    assert rows["window"]["attended_tokens"] == pytest.approx(rows["louiskv"]["attended_tokens"], abs=2)
    assert rows["louiskv"]["steps"] == 25 and rows["dynamic-cache"]["steps"] == 3
    assert all(row["mean_ms"] > 0 and row["device_kv_bytes"] > 0 for row in list(rows.values())[:-1])
    assert "needs a CUDA device" in rows["offloaded-cache"]["error"]
    assert found["ratios"]["louiskv / window"] == rows["louiskv"]["mean_ms"] / rows["window"]["mean_ms"]
    assert found["ratios"]["louiskv@1 / louiskv@0"] == rows["louiskv@1"]["mean_ms"] / rows["louiskv@0"]["mean_ms"]
    plus, faithful = rows["louiskv-plus@1"]["mean_ms"], rows["louiskv@1"]["mean_ms"]
    assert found["ratios"]["louiskv-plus@1 / louiskv@1"] == plus / faithful
    assert found["ratios"]["dynamic-cache / louiskv"] == rows["dynamic-cache"]["mean_ms"] / rows["louiskv"]["mean_ms"]
    assert re.search(r"^louiskv@1( +[\d.,]+){3} +25 ", shown.stdout, re.M) and "dynamic-cache over 3" in shown.stdout


def test_decode_of_a_batch(tmp_path: Path) -> None:
    """Several sequences, with the stock cache filled by a prompt that ends in a single token."""
    path = tmp_path / "decode.json"
    run(
        "decode", *CPU, *SMALL, "--policies", "louiskv,dynamic-cache", "--context", 201, "--prefill-chunk", 50,
        "--batch-size", 2, "--fill", "prefill", "--quick", "--steps", 6, "--json", path,
    )  # fmt: skip
    ours, stock = read(path)["figures"]

    assert ours["tokens_per_s"] == pytest.approx(2e3 / ours["mean_ms"])
    assert stock["attended_tokens"] == 201


def test_prefill(tmp_path: Path) -> None:
    """All at once and in chunks, with first runs and ratios."""
    path = tmp_path / "prefill.json"
    run("prefill", *CPU, *SMALL, "--contexts", "150,80", "--chunks", "0,100", "--repeats", 1, "--json", path)
    found = read(path)
    rows = found["figures"]

    assert [(row["name"], row["context"], row["chunk"]) for row in rows] == [
        (name, context, chunk)
        for context, chunk in ((150, 0), (150, 100), (80, 0))
        for name in ("dynamic-cache", "louiskv")
    ]
    assert all(row["first_run_seconds"] > 0 and row["seconds_until_idle"] > 0 for row in rows)
    ratio = rows[1]["seconds_to_first_token"] / rows[0]["seconds_to_first_token"]
    assert found["ratios"]["louiskv / dynamic-cache, 150 tokens, at once"] == ratio
    assert len(found["ratios"]) == 3


@pytest.mark.parametrize("command", ["decode", "prefill", "gather", "kernels"])
def test_help(command: str) -> None:
    """Every command explains itself."""
    assert "Usage:" in run(command, "--help").stdout
    assert f" {command} " in run("--help").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", ["decode", "prefill", "gather", "kernels"])
def test_without_a_cuda_device(command: str) -> None:
    """It says so, in one line."""
    assert f"`kvframe bench {command}` needs a CUDA device" in fails(command)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("decode", "--device", "cpu"), "--device cpu takes --model-shape tiny"),
        (("decode", "--device", "tpu"), "--device must be cuda or cpu; got 'tpu'"),
        (("decode", "--model-shape", "llama"), "--model-shape must be one of tiny, llama-3.1-8b"),
        (("decode", *CPU, "--policies", "luiskv"), "did you mean 'louiskv'?"),
        (("decode", *CPU, "--policies", "louiskv@2"), "has the rate '2'; expected a number from 0 to 1"),
        (("decode", *CPU, "--policies", "louiskv+fast"), "ends in +fast"),
        (("decode", *CPU, "--policies", "window,window"), "names 'window' twice"),
        (("decode", *CPU, "--policies", ","), "names nobody"),
        (("decode", *CPU, "--fill", "zeros"), "--fill must be one of random, prefill"),
        (("decode", *CPU, "--policies", "louiskv", "--quick", "--compile"), "compile=True"),
        (("decode", *CPU, "--dense-layers", "0;1"), "--dense-layers must be whole numbers"),
        (("decode", *CPU, "--json", "missing/a.json"), "there is no directory"),
        (("prefill", *CPU, "--contexts", "many"), "--contexts must be whole numbers >= 2"),
        (("prefill", *CPU, "--contexts", ""), "--contexts must be whole numbers >= 2"),
        (("prefill", *CPU, "--policies", "ful"), "did you mean 'full'?"),
        (("prefill", *CPU, "--policies", ""), "names nobody"),
        (("gather", "--backends", "rocm"), "--backends must be one of cuda, triton"),
        (("gather", "--tokens", "0"), "--tokens must be whole numbers >= 1"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what was expected and what came, before anything is built."""
    monkeypatch.chdir(tmp_path)

    assert words in fails(*arguments)
