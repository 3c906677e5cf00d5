"""The scripts of examples/ run."""

import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

if TYPE_CHECKING:
    from conftest import SmolLM2

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def save_tiny_model(folder: Path, smollm2: "SmolLM2") -> None:
    """A random model in a directory, with SmolLM2's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(smollm2.tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)


@pytest.mark.model
def test_ablation(smollm2: "SmolLM2", tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints a row for each variant; a tiny random model stands in for the real one, whose tokenizer it needs."""
    save_tiny_model(tmp_path, smollm2)
    script = runpy.run_path(str(EXAMPLES / "ablation.py"))

    script["main"](["--model", str(tmp_path), "--context", "400", "--steps", "4", "--budget", "32"])

    printed = capsys.readouterr().out
    assert all(policy.name.split()[0] in printed for policy in script["variants"](32))


@pytest.mark.model
def test_study(smollm2: "SmolLM2", tmp_path: Path) -> None:
    """All of it can be planned, and the base runs; a tiny random model stands in for the real one, as above."""
    from kvframe.eval import run_study
    from kvframe.eval.engine import make_engine
    from kvframe.eval.estimate import Estimate, estimates
    from kvframe.eval.studyfile import StudyFile

    file = StudyFile.read(EXAMPLES / "study.py")
    study = file.study()
    found = estimates(study, study.cells())
    assert len(found) > 40 and all(isinstance(each, Estimate) and each.fits for each in found.values())

    save_tiny_model(tmp_path, smollm2)
    small = attrs.evolve(study, model=tmp_path, vary={}, policies=[], token_budget=48, seeds=0, watch=0)
    results = run_study(small, tmp_path / "results.sqlite", engine=make_engine("inline"))
    assert [outcome.error for outcome in results.outcomes.values()] == [None, None]


def test_every_example_is_tested() -> None:
    """A script that nobody runs stops working."""
    tested = Path(__file__).read_text(encoding="utf-8")

    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tested] == []
