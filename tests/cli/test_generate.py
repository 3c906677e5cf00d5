"""`kvframe generate` on a tiny random model."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.words import TEXT
from rich.console import Console
from typer.testing import Result

from kvframe.cli import console
from kvframe.cli.models import load
from kvframe.cli.running import generate_text
from kvframe.report import Report

Run = Callable[..., Result]
RunJson = Callable[..., Any]
Fails = Callable[..., str]

PROMPT = TEXT * 6
SMALL = [f"--set={each}" for each in ("token_budget=16", "sink_size=4", "window_size=8", "cluster_size=4")]


def arguments(folder: Path, *more: object) -> tuple[object, ...]:
    """A call on the tiny model under a small LouisKV."""
    return ("generate", folder, "--prompt", PROMPT, *SMALL, "--max-new-tokens", 24, *more)


def test_json_is_complete(tiny_model: Path, run_json: RunJson) -> None:
    """Text, counts and the whole report, and nothing else on standard output."""
    found = run_json(*arguments(tiny_model))

    assert found.keys() == {"text", "prompt_tokens", "new_tokens", "report"}
    assert found["prompt_tokens"] == len(PROMPT.split()) and found["new_tokens"] == 24
    assert len(found["text"].split()) == 24
    assert found["report"].keys() == {field.name for field in Report.__attrs_attrs__}
    assert found["report"]["policy"]["name"] == "louiskv" and found["report"]["execution"] == "offload"
    assert found["report"]["rows_selected"] > 0


def test_text_is_streamed_before_the_report(tiny_model: Path, run: Run, run_json: RunJson) -> None:
    """Standard output is the same text, a rule, and the report."""
    text = run_json(*arguments(tiny_model))["text"]
    lines = run(*arguments(tiny_model)).stdout.splitlines()

    assert lines[0].split() == text.split()
    assert set(lines[1]) == {"─"}
    assert lines[2].split() == ["policy", "louiskv,", "offload", "execution"]
    assert any(line.startswith("retrieval rate") for line in lines)


@pytest.mark.parametrize("execution", ["offload", "dense", "shadow"])
@pytest.mark.parametrize("policy", ["full", "window", "louiskv", "oracle_topk"])
def test_executions_and_policies(execution: str, policy: str, tiny_model: Path, run_json: RunJson) -> None:
    """Any policy in any execution."""
    found = run_json("generate", tiny_model, "--prompt", PROMPT, "--policy", policy, "--execution", execution,
                     "--max-new-tokens", 3)  # fmt: skip

    assert (found["report"]["execution"], found["report"]["policy"]["name"]) == (execution, policy)


def test_plain_generate_says_the_same(tiny_model: Path, run_json: RunJson) -> None:
    """With everything attended, the text is that of the model alone."""
    model, tokenizer = load(str(tiny_model))
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :])

    assert run_json(*arguments(tiny_model, "--policy", "full")[:4], "--max-new-tokens", 24)["text"] == expected


def test_chunked_prefill(tiny_model: Path, run_json: RunJson) -> None:
    """Reading the prompt in chunks changes nothing where all is attended."""
    call = ("generate", tiny_model, "--prompt", PROMPT, "--policy", "full", "--max-new-tokens", 8)

    assert run_json(*call, "--prefill-chunk-size", 32)["text"] == run_json(*call)["text"]


def test_prompt_from_a_file(tiny_model: Path, run_json: RunJson, tmp_path: Path) -> None:
    """The same prompt, from a file."""
    (tmp_path / "prompt.txt").write_text(PROMPT)
    from_file = run_json("generate", tiny_model, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 4)

    assert from_file["text"] == run_json("generate", tiny_model, "--prompt", PROMPT, "--max-new-tokens", 4)["text"]


def test_sampling_is_seeded(tiny_model: Path, run_json: RunJson) -> None:
    """A temperature samples; the seed decides what."""
    texts = [run_json(*arguments(tiny_model, "--temperature", 2, "--seed", seed))["text"] for seed in (1, 1, 2)]

    assert texts[0] == texts[1] != texts[2]


def test_dtype(tiny_model: Path, run_json: RunJson) -> None:
    """Half the bits, half the memory."""
    sizes = [
        run_json(*arguments(tiny_model, "--dtype", dtype))["report"]["host_kv_bytes"]
        for dtype in ("float32", "bfloat16")
    ]

    assert sizes[0] == 2 * sizes[1]


def test_chat(tiny_model: Path, fails: Fails, run_json: RunJson, tmp_path: Path) -> None:
    """The template is used if there is one, unless it is not wanted; without one, --chat is an error."""
    assert "--chat needs a tokenizer with a chat template" in fails(*arguments(tiny_model, "--chat"))
    _, tokenizer = load(str(tiny_model))
    tokenizer.chat_template = "<s> fox {{ messages[0]['content'] }} cat"
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    plain = len(PROMPT.split())

    for flag, extra in (((), 3), (("--chat",), 3), (("--no-chat",), 0)):
        call = ("generate", tmp_path, "--prompt", PROMPT.strip(), "--max-new-tokens", 2, *flag)
        assert run_json(*call)["prompt_tokens"] == plain + extra


def test_calibration_sets_tau(tiny_model: Path, run: Run, run_json: RunJson, fails: Fails, tmp_path: Path) -> None:
    """What `kvframe calibrate` wrote becomes tau and rope, unless --set says something else."""
    file, text = tmp_path / "tau.json", tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    run("calibrate", tiny_model, "--text-file", text, "--rate", 0.3, "--rope", "before", "--output", file)
    found = json.loads(file.read_text())

    trigger = run_json(*arguments(tiny_model, "--calibration", file))["report"]["policy"]["trigger"]

    assert (trigger["tau"], trigger["rope"]) == (found["tau"], "before")
    assert "both give tau" in fails(*arguments(tiny_model, "--calibration", file, "--set", "tau=0.5"))
    no_tau = ("generate", tiny_model, "--prompt", PROMPT, "--policy", "window", "--calibration", file)
    assert "policy 'window' does not have" in fails(*no_tau)


def test_policy_that_does_not_fit_the_model(tiny_model: Path, fails: Fails) -> None:
    """What the model's size forbids is one line as well."""
    assert "dense_layers names layer 9" in fails(*arguments(tiny_model, "--set", "dense_layers=9"))
    assert "tau has 2 values, the model has 4 layers" in fails(*arguments(tiny_model, "--set", "tau=0.5,0.6"))


class TestBar:
    """The bar over the prompt."""

    @pytest.fixture
    def screen(self, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
        """What a terminal on standard error would show."""
        screen = io.StringIO()
        monkeypatch.setattr(console, "errors", Console(file=screen, force_terminal=True, width=100))
        return screen

    @pytest.mark.parametrize("chunk", [None, 32])
    def test_shown_on_a_terminal(self, chunk: int | None, tiny_model: Path, run: Run, screen: io.StringIO) -> None:
        """It counts to the end, and standard output does not see it."""
        more = () if chunk is None else ("--prefill-chunk-size", chunk)
        result = run(*arguments(tiny_model, *more))

        assert "reading the prompt" in screen.getvalue() and "100%" in screen.getvalue()
        assert "reading" not in result.stdout

    def test_hidden_for_machines(self, tiny_model: Path, run_json: RunJson, screen: io.StringIO) -> None:
        """With --json there is none, on a terminal either."""
        run_json(*arguments(tiny_model))

        assert screen.getvalue() == ""

    def test_leaves_no_hooks(self, tiny_model: Path) -> None:
        """Not after a run, and not after one that failed."""
        import kvframe

        model, tokenizer = load(str(tiny_model))
        ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        policy = kvframe.policy("window", sink_size=2, window_size=8)
        generate_text(model, tokenizer, ids, policy, quiet=True, max_new_tokens=2, do_sample=False)
        torch.nn.init.constant_(model.get_input_embeddings().weight, float("nan"))
        with pytest.raises(kvframe.errors.NonFiniteError):
            generate_text(model, tokenizer, ids, policy, quiet=True, max_new_tokens=2, do_sample=False)

        assert not any(module._forward_hooks for module in model.modules())
