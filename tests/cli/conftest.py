"""A tiny random model with a tokenizer of its own, saved as a directory."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.words import TEXT
from typer.testing import CliRunner, Result

from kvframe.cli.app import app


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random Llama of four layers and a tokenizer of words; it has no chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted(set(TEXT.split()))
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[:3] = 0.0  # words, rather than special tokens, which no text shows
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine blocks, and how wide its terminal is, is not part of a test."""
    monkeypatch.delenv("KVFRAME_DISABLE_PLUGINS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


Run = Callable[..., Result]


@pytest.fixture
def run() -> Run:
    """A function that runs a command in this process and checks its exit code."""

    def run(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def run_json(run: Run) -> Callable[..., Any]:
    """A function that runs a command with --json and reads what stands on standard output; nothing else may."""

    def run_json(*arguments: object, code: int = 0) -> Any:
        return json.loads(run(*arguments, "--json", code=code).stdout)

    return run_json


@pytest.fixture
def fails(run: Run) -> Callable[..., str]:
    """A function that runs a command which kvframe refuses: one clean line on standard error, exit code 2."""

    def fails(*arguments: object) -> str:
        result = run(*arguments, code=2)
        lines = result.stderr.strip().splitlines()
        assert result.stdout == ""
        assert len(lines) == 1 and re.match("error: ", lines[0]), result.stderr
        return lines[0].removeprefix("error: ")

    return fails
