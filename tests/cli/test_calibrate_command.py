"""`kvframe calibrate` on a tiny random model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.words import TEXT
from typer.testing import Result

from kvframe.calibration import Calibration

Run = Callable[..., Result]
RunJson = Callable[..., Any]
Fails = Callable[..., str]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A few hundred words."""
    (tmp_path / "text.txt").write_text(TEXT * 20)
    return tmp_path / "text.txt"


def test_json_and_file_agree(tiny_model: Path, run_json: RunJson, text_file: Path, tmp_path: Path) -> None:
    """One tau a layer, the rates it gives, and the same in the file."""
    output = tmp_path / "tau.json"
    found = run_json("calibrate", tiny_model, "--text-file", text_file, "--rate", 0.25, "--output", output)

    assert found == json.loads(output.read_text()) == Calibration.load(output).to_dict()
    assert len(found["tau"]) == len(found["achieved"]) == 4
    assert all(abs(rate - 0.25) < 0.05 for rate in found["achieved"])
    assert found["num_samples"] == len((TEXT * 20).split()) - 1


def test_text_says_what_to_set(tiny_model: Path, run: Run, text_file: Path) -> None:
    """The last line can be given to `kvframe generate`."""
    lines = run("calibrate", tiny_model, "--text-file", text_file, "--rope", "before").stdout.splitlines()

    assert lines[-1].startswith("--set tau=0.") or lines[-1].startswith("--set tau=-0.")
    assert len(lines[-1].split("=")[1].split()[0].split(",")) == 4 and lines[-1].endswith(" --set rope=before")
    assert "wanted 7.0%" in lines[-2]


def test_one_tau_for_the_model(tiny_model: Path, run_json: RunJson, fails: Fails, text_file: Path) -> None:
    """It leaves out the layers that are dense."""
    call = ("calibrate", tiny_model, "--text-file", text_file, "--per", "model", "--rate", 0.25)
    found = run_json(*call)

    assert isinstance(found["tau"], float)
    assert sum(found["achieved"][2:]) / 2 == pytest.approx(0.25, abs=0.01)
    assert "dense_layers names every layer" in fails(*call, "--dense-layers", "0,1,2,3")


def test_a_trigger_with_options(tiny_model: Path, run: Run, run_json: RunJson, fails: Fails, text_file: Path) -> None:
    """All of it fires at the rate; an anchor is found beside tau. What is found cannot be set."""
    call = ("calibrate", tiny_model, "--text-file", text_file, "--rate", 0.4, "--tokens", 120)
    call += ("--trigger", "anchor=0.5")
    found = run_json(*call, "--trigger", "max_age=9")

    assert len(found["anchor"]) == 4
    assert all(abs(rate - 0.4) < 0.05 for rate in found["achieved"])
    assert " --set anchor=" in run(*call).stdout.splitlines()[-1]
    assert "tau is what is looked for" in fails(*call, "--trigger", "tau=0.5")
    assert "did you mean 'max_age'" in fails(*call, "--trigger", "max_ages=3")


def test_tokens_are_shared_among_texts(tiny_model: Path, run_json: RunJson, text_file: Path) -> None:
    """Each text gives its part."""
    call = ("calibrate", tiny_model, "--text-file", text_file, "--text-file", text_file, "--tokens", 101)

    assert run_json(*call)["num_samples"] == 2 * (51 - 1)


def test_text_of_the_standard_library(tiny_model: Path, run_json: RunJson) -> None:
    """Without a file there is always text."""
    assert run_json("calibrate", tiny_model, "--tokens", 300)["num_samples"] == 299


def test_empty_text(tiny_model: Path, fails: Fails, tmp_path: Path) -> None:
    """Nothing can be said about nothing."""
    (tmp_path / "empty.txt").touch()

    assert "nothing to calibrate on" in fails("calibrate", tiny_model, "--text-file", tmp_path / "empty.txt")


def test_samples_of_a_task(tiny_model: Path, run_json: RunJson, fails: Fails) -> None:
    """As many of them as the tokens ask for, the last one cut; the seed decides which."""
    call = ("calibrate", tiny_model, "--task", "perplexity", "--set", "num_tokens=9", "--context", 60, "--tokens", 150)
    found = run_json(*call)

    assert found["num_samples"] == 59 + 59 + 29
    assert found == run_json(*call) != run_json(*call, "--seed", 7)
    assert "did you mean 'passkey'?" in fails("calibrate", tiny_model, "--task", "paskey")
    assert "exclude each other" in fails(*call, "--text-file", "a.txt")
    assert "--set is an option of --task" in fails("calibrate", tiny_model, "--set", "num_tokens=9")
