"""`kvframe demo`, and the prompt that it asks about."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import kvframe
from kvframe import models
from kvframe.demo import ANIMALS, build_prompt, prose_topics
from kvframe.errors import ConfigError

Run = Callable[..., Result]
RunJson = Callable[..., Any]


@pytest.fixture
def tiny_chat(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model with a chat template, in the place of SmolLM2."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text("<s> {{ messages[0]['content'] }} <s>")
    monkeypatch.setattr(models, "fetch_smollm2", lambda progress: folder)
    return folder


def load_tokenizer(folder: Path) -> Any:
    """A tokenizer alone."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class TestPrompt:
    """What the model is asked."""

    def test_prose_is_prose(self) -> None:
        """Sentences, without the tables and grammars between them, and without what is to be remembered."""
        topics = prose_topics()
        paragraphs = [paragraph for topic in topics for paragraph in topic.split("\n\n")]

        assert len(topics) > 20 and len(paragraphs) > 100
        assert all(paragraph[0].isupper() and paragraph.endswith(".") for paragraph in paragraphs)
        assert not any(re.search(rf"\b{animal}", " ".join(topics), re.IGNORECASE) for animal in ANIMALS)

    def test_holds_the_fact_once(self, tiny_chat: Path) -> None:
        """The tokens between start and end are the fact, and nothing else tells it."""
        tokenizer = load_tokenizer(tiny_chat)
        prompt = build_prompt(tokenizer, num_tokens=600, depth=0.5)
        encoded = tokenizer(prompt.fact, add_special_tokens=False)["input_ids"]

        assert prompt.input_ids[0, prompt.fact_start : prompt.fact_end].tolist() == encoded
        assert prompt.num_tokens == prompt.input_ids.shape[1] >= 600
        assert 200 < prompt.fact_start < 400
        assert prompt.answer in prompt.fact and prompt.answer not in prompt.question

    def test_seed_decides(self, tiny_chat: Path) -> None:
        """The same seed gives the same prompt, others give others."""
        tokenizer = load_tokenizer(tiny_chat)
        prompts = [build_prompt(tokenizer, num_tokens=300, seed=seed) for seed in (0, 0, *range(1, 9))]

        assert prompts[0].input_ids.equal(prompts[1].input_ids)
        assert len({prompt.answer for prompt in prompts}) > 3

    def test_answer_is_a_word(self, tiny_chat: Path) -> None:
        """Case does not matter; a part of another word is no answer."""
        prompt = build_prompt(load_tokenizer(tiny_chat), num_tokens=300)

        assert prompt.is_answered_by(f"It is the {prompt.answer.upper()}.")
        assert not prompt.is_answered_by(f"It is the {prompt.answer}ish thing.")

    def test_more_than_there_is(self, tiny_chat: Path, tiny_model: Path) -> None:
        """More prose than the standard library has, and a tokenizer that cannot chat."""
        with pytest.raises(ConfigError, match="10000000 were asked for; ask for fewer"):
            build_prompt(load_tokenizer(tiny_chat), num_tokens=10_000_000)
        with pytest.raises(ConfigError, match="chat template"):
            build_prompt(load_tokenizer(tiny_model))

    @pytest.mark.model
    def test_length_and_place(self, smollm2: Any) -> None:
        """For any seed: 4,000 tokens and more, the fact far behind the sinks and far before the window."""
        policy = kvframe.policy("louiskv-long-input")
        for seed in range(5):
            prompt = build_prompt(smollm2.tokenizer, seed=seed)
            assert 4000 <= prompt.num_tokens < 5000
            assert policy.sink_size + 100 < prompt.fact_start < prompt.fact_end < 1000
            assert prompt.fact_end < prompt.num_tokens - policy.window_size - 1000


class TestCommand:
    """The command, on a model that knows nothing and, once, on the one that does."""

    def test_fact_that_does_not_come_back(self, tiny_chat: Path, run: Run, run_json: RunJson) -> None:
        """A random model misses it: the command says so, and its exit code is 1."""
        call = ("demo", "--prompt-tokens", 300, "--token-budget", 64, "--set", "window_size=32")
        found = run_json(*call, code=1)
        result = run(*call, code=1)

        assert found["found"] is False and found["answer"] not in found["text"]
        assert f"The fact did NOT come back: the animal is the {found['answer']}." in result.stdout
        assert "retrieval rate" in result.stdout
        assert "so it has to be retrieved" in result.stderr and found["question"] in result.stderr

    def test_json_is_complete(self, tiny_chat: Path, run_json: RunJson) -> None:
        """What was asked, what came, and the report."""
        found = run_json("demo", "--prompt-tokens", 300, code=1)

        keys = {"model", "question", "answer", "found", "fact_start", "fact_end"}
        assert found.keys() == keys | {"text", "prompt_tokens", "new_tokens", "report"}
        assert found["model"] == str(tiny_chat) and found["prompt_tokens"] >= 300
        assert found["report"]["policy"]["name"] == "louiskv-long-input"

    def test_budget_of_512(self, tiny_chat: Path, run_json: RunJson) -> None:
        """512 retrieved tokens unless something else is said; a policy without a budget takes none."""

        def capacity(*more: object) -> int:
            policy = run_json("demo", "--prompt-tokens", 256, *more, code=1)["report"]["policy"]
            return kvframe.Policy.from_dict(policy).selector.capacity

        assert capacity() == capacity("--policy", "louiskv") == 512
        assert capacity("--token-budget", 100) == capacity("--set", "token_budget=100") == 100
        assert capacity("--policy", "window") == 0

    def test_says_where_nothing_has_to_be_retrieved(self, tiny_chat: Path, run: Run) -> None:
        """A fact inside the window proves nothing, and full attention does not either."""
        assert "attended in any case" in run("demo", "--prompt-tokens", 256, code=1).stderr
        assert "attended in any case" in run("demo", "--prompt-tokens", 256, "--policy", "full", code=1).stderr

    def test_download_only(self, tiny_chat: Path, run: Run, run_json: RunJson) -> None:
        """Fetches, and loads nothing."""
        assert run("demo", "--download-only").stdout == ""
        assert run_json("demo", "--download-only") == {"model": str(tiny_chat)}

    def test_messages_of_the_fetch(self, tiny_chat: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        """They go to standard error, unless for machines."""

        def fetch(progress: Callable[[str], None]) -> Path:
            progress("downloading it")
            return tiny_chat

        monkeypatch.setattr(models, "fetch_smollm2", fetch)

        assert run("demo", "--download-only").stderr == "downloading it\n"
        assert run("demo", "--download-only", "--json").stderr == ""

    @pytest.mark.model
    def test_fact_comes_back(self, smollm2: Any, run_json: RunJson, monkeypatch: pytest.MonkeyPatch) -> None:
        """A shorter prompt on the real model, with a window that does not reach the fact."""
        monkeypatch.setattr(models, "fetch_smollm2", lambda progress: smollm2.path)
        sizes = ("--token-budget", 128, "--set", "window_size=128")

        found = run_json("demo", "--prompt-tokens", 800, *sizes)

        assert found["found"] and found["answer"] in found["text"]
        assert found["fact_start"] > 32 and found["fact_end"] < found["prompt_tokens"] - 128
        assert found["report"]["rows_recalled"] > 0 and found["report"]["retrieval_rate"] < 1
        assert found["report"]["host_kv_bytes"] > found["report"]["device_kv_bytes"] * 0.5
