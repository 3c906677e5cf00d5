"""The scripts of examples/ run."""

import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import SmolLM2

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.model
def test_ablation(smollm2: "SmolLM2", tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints a row for each variant; a tiny random model stands in for the real one, whose tokenizer it needs."""
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
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    script = runpy.run_path(str(EXAMPLES / "ablation.py"))

    script["main"](["--model", str(tmp_path), "--context", "400", "--steps", "4", "--budget", "32"])

    printed = capsys.readouterr().out
    assert all(policy.name.split()[0] in printed for policy in script["variants"](32))


def test_every_example_is_tested() -> None:
    """A script that nobody runs stops working."""
    tested = Path(__file__).read_text(encoding="utf-8")

    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tested] == []
