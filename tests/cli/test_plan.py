"""`kvframe plan`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import kvframe
from kvframe.cli.plan import parse_bytes
from kvframe.registry import default_registry

Run = Callable[..., Result]
RunJson = Callable[..., Any]
Fails = Callable[..., str]


def test_a_plan_that_fits(run: Run) -> None:
    """128K tokens of an 8B model on 24 GiB: it says what for, how fast, and what a full cache would need."""
    text = run("plan", "llama-3.1-8b", "--context", 131072, "--gpu-memory", "24GiB").stdout

    assert "8.03 billion parameters in bfloat16, 32 of 32 layers" in text
    for label in ("weights", "KV of dense layers", "slots", "index and ledger", "activations", "on the host, pinned"):
        assert label in text
    assert "in chunks of 32768 tokens" in text and "tokens/s" in text and "time to first token" in text
    assert "16.06 GiB of it KV: does not fit" in text
    assert "\nfits: " in text and "of 24.00 GiB on the GPU" in text
    assert "note: speeds are predicted for an NVIDIA H200" in text


def test_a_plan_that_does_not(run: Run, run_json: RunJson) -> None:
    """Exit code 1, and what would help."""
    arguments = ("plan", "llama-3.1-8b", "--policy", "full", "--gpu-memory", "24GiB")
    text, found = run(*arguments, code=1).stdout, run_json(*arguments, code=1)

    assert "does not fit: needs " in text and "what would help: " in text
    assert found["fits"] is False and found["missing_bytes"] > 0 and "a shorter context" in found["advice"]


def test_a_model_of_ones_own(tiny_model: Path, run_json: RunJson) -> None:
    """A directory and its config file say the same; options reach the policy, the request and the model."""
    options = ("--context", 300, "--max-new-tokens", 20, "--batch-size", 2, "--gpu-memory", "8GB")
    options += ("--prefill-chunk-size", 128, "--retrieval-rate", 0.5, "--set", "token_budget=77")
    found = run_json("plan", tiny_model, *options)
    from_file = run_json("plan", tiny_model / "config.json", *options)
    half = run_json("plan", tiny_model, *options, "--dtype", "bfloat16")

    assert from_file == {**found, "model": str(tiny_model / "config.json")}
    assert found["fits"] is True and found["chunk"] == 128 and found["batch_size"] == 2
    assert found["shape"]["retrieval_layers"] == [0, 1, 2, 3] and found["shape"]["num_kv_heads"] == 2
    assert found["shape"]["dtype"] == "float32" and half["shape"]["dtype"] == "bfloat16"
    assert half["gpu"]["weights"] * 2 == found["gpu"]["weights"]
    assert found["gpu"]["total"] == sum(found["gpu"].values()) - found["gpu"]["total"]
    assert found["host"]["total"] == found["host"]["pool"] + found["host"]["positions"]
    # Two of four layers are dense: 320 tokens of 2 sequences in 2 heads of 8 + 8 float32 each.
    assert found["gpu"]["dense_kv"] == found["host"]["pool"] == 2 * 320 * 2 * 2 * 16 * 4
    assert found["device"]["gpu_memory"] == 8 * 10**9
    assert found["speed"]["retrieval_rate"] == 0.5
    assert kvframe.Policy.from_dict(found["policy"]) == kvframe.policy("louiskv", token_budget=77)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(tiny_model: Path, run_json: RunJson, fails: Fails) -> None:
    """24 GiB are assumed, and that is said; there is nothing to measure."""
    found = run_json("plan", tiny_model)

    assert found["device"]["gpu_memory"] == 24 * 2**30
    assert any("24 GiB are assumed" in note for note in found["notes"])
    assert "no CUDA device to measure" in fails("plan", tiny_model, "--measure")


def test_a_config_without_dtype(tmp_path: Path, tiny_model: Path, run_json: RunJson) -> None:
    """bfloat16 is assumed, and that is said."""
    config = json.loads((tiny_model / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = run_json("plan", tmp_path)

    assert found["shape"]["dtype"] == "bfloat16"
    assert any("bfloat16 is assumed" in note for note in found["notes"])


@pytest.mark.parametrize(
    "text, size",
    [
        ("24GiB", 24 * 2**30),
        ("80GB", 80 * 10**9),
        ("80 gb", 80 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("512MiB", 2**29),
        ("12345", 12345),
        ("12345 B", 12345),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """Decimal and binary units, and plain bytes."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24 bananas", "-1GiB", "0", "nan", "1e9", "0.1", "9" * 400])
def test_texts_that_are_no_size(text: str, fails: Fails) -> None:
    """Each is refused before anything else is done."""
    assert "--gpu-memory must be a size such as 24GiB" in fails("plan", "llama-3.1-8b", f"--gpu-memory={text}")


def test_mistakes(tmp_path: Path, tiny_model: Path, fails: Fails) -> None:
    """What cannot be planned is one line."""
    assert "nothing is fetched" in fails("plan", "some-org/some-model")
    assert "without config.json" in fails("plan", tmp_path)
    (tmp_path / "broken.json").write_text("{")
    assert "cannot read a model config from" in fails("plan", tmp_path / "broken.json")
    assert "--dtype must be one of" in fails("plan", tiny_model, "--dtype", "float8")
    assert "dense_layers names layer 9" in fails("plan", tiny_model, "--set", "dense_layers=9")
    assert "no policy named 'louis'" in fails("plan", tiny_model, "--policy", "louis")


def test_what_plugins_say(tiny_model: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that a plugin objects to is refused as `attach` refuses it."""
    plugins = type(default_registry().plugins)
    monkeypatch.setattr(plugins, "check_policy", lambda self, policy, layout: [f"{layout.num_layers} are too many"])

    assert fails("plan", tiny_model) == "the policy does not fit the model: 4 are too many"
