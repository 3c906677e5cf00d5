"""The sweep over model families: a sample of it, and what it does with failures."""

import json

import pytest
import torch

from kvframe.errors import UnknownNameError
from kvframe.hf.families import Outcome, Status, build_config, build_model, command, compare, outcomes
from kvframe.hf.families.sizes import tiny_value
from kvframe.hf.families.tables import markdown_page, summary

# Grouped-query and multi-head; absolute, rotary and partly rotary positions; experts; sliding, linear and state-space
# layers in between; an encoder turned decoder.
SAMPLE = (
    "bert",
    "cohere2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "jamba",
    "llama",
    "mixtral",
    "olmo2",
    "opt",
    "qwen3",
    "qwen3_next",
)


@pytest.fixture(scope="module")
def found() -> dict[str, Outcome]:
    """One sweep for all the tests that look at its outcomes."""
    return {outcome.model_type: outcome for outcome in outcomes([*SAMPLE, "deepseek_v3", "gpt_oss", "mamba"])}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_family_is_equal(found: dict[str, Outcome], model_type: str) -> None:
    """A full budget gives plain generate's logits, a tight one those of dense execution."""
    outcome = found[model_type]

    assert (outcome.status, outcome.reason) == (Status.EQUAL, "")
    assert outcome.selections > 0 and outcome.rows_recalled > 0
    assert 1 <= outcome.retrieval_layers <= outcome.layers


@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_tight_budget_matters(found: dict[str, Outcome], model_type: str) -> None:
    """Under it the logits are others than plain generate's, so that their equality to dense says something."""
    effect = found[model_type].tight_effect

    assert effect is not None and effect > 0.01


@pytest.mark.parametrize(
    "model_type, word", [("deepseek_v3", "latent"), ("gpt_oss", "sinks"), ("mamba", "nothing to retrieve")]
)
def test_a_refused_family_says_why(found: dict[str, Outcome], model_type: str, word: str) -> None:
    """What would come out wrong is refused."""
    outcome = found[model_type]

    assert outcome.status is Status.REFUSED
    assert word in outcome.reason


def test_a_difference_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rounding error is small enough for a tolerance of zero."""
    monkeypatch.setattr(compare, "TOLERANCE", 0.0)

    outcome = compare.compare("llama")

    assert outcome.status is Status.DIFFERENT
    assert "logits" in outcome.reason


def test_a_failing_build_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that transformers cannot run is no fault of the cache."""

    def fail(model_type: str) -> None:
        raise ValueError("one\n  two")

    monkeypatch.setattr(compare, "build_model", fail)

    outcome = compare.compare("llama")

    assert (outcome.status, outcome.reason) == (Status.NOT_BUILDABLE, "ValueError: one two")


def test_a_failing_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that is no refusal is an error of ours."""

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(compare, "attach", fail)

    outcome = compare.compare("llama")

    assert (outcome.status, outcome.reason) == (Status.ERROR, "RuntimeError: boom")


def test_a_family_that_takes_too_long_stops_nothing() -> None:
    """Its process is ended and the next one has its turn."""
    ends = list(outcomes(["llama", "gpt2"], timeout=0.0))

    assert [outcome.status for outcome in ends] == [Status.ERROR, Status.ERROR]
    assert "no answer" in ends[0].reason


def test_families_run_side_by_side() -> None:
    """Each outcome comes once, in whatever order."""
    types = {"gpt2", "llama", "opt"}

    ends = list(outcomes(sorted(types), jobs=2))

    assert len(ends) == len(types)
    assert {outcome.model_type for outcome in ends} == types


def test_a_tiny_model_tells_contexts_apart() -> None:
    """One other token early in the prompt moves the logits of the last."""
    model = build_model("llama")
    tokens = torch.arange(20, 60)[None]
    other = tokens.clone()
    other[0, 3] = 99

    with torch.no_grad():
        difference = model(tokens).logits[0, -1] - model(other).logits[0, -1]

    assert difference.abs().max() > 0.1


def test_a_tiny_model_is_the_same_again() -> None:
    """Weights come from the seed alone."""
    first, second = build_model("qwen3"), build_model("qwen3")

    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("model_type", ["gemma3_text", "lfm2", "ministral", "qwen3_next"])
def test_mixed_families_keep_layers_that_attend_to_everything(model_type: str) -> None:
    """Without one there would be nothing to retrieve."""
    kinds = build_config(model_type).layer_types

    assert "full_attention" in kinds
    assert len(set(kinds)) > 1


def test_latent_attention_has_keys_for_every_head() -> None:
    """A latent expands to all heads, so there is no grouping to shrink to."""
    config = build_config("deepseek_v3")

    assert config.num_key_value_heads == config.num_attention_heads
    assert config.head_dim == config.qk_rope_head_dim


@pytest.mark.parametrize(
    "name, value",
    [("hidden_size", 64), ("n_embd", 64), ("decoder_layers", 2), ("eos_token_id", 2), ("rope_theta", None)],
)
def test_sizes_follow_names(name: str, value: int | None) -> None:
    """A name that no rule knows keeps the family's own value."""
    assert tiny_value(name) == value


OUTCOMES = [
    Outcome(model_type="b", status=Status.REFUSED, reason="no | way"),
    Outcome(
        model_type="a",
        status=Status.EQUAL,
        retrieval_layers=1,
        layers=4,
        selections=7,
        rows_recalled=9,
        full_error=1e-7,
        tight_error=2e-7,
        tight_effect=0.5,
    ),
]


def test_the_page_has_every_family() -> None:
    """One table a status; a bar in a reason does not end its cell."""
    page = markdown_page(OUTCOMES)

    assert "| a | 1 of 4 | 7 | 9 | 1.0e-07 | 2.0e-07 | 5.0e-01 |" in page
    assert "| b | no &#124; way |" in page
    assert "## Not buildable" not in page


def test_the_summary_counts() -> None:
    """Statuses that nothing ended in are counted too."""
    assert summary(OUTCOMES) == "1 equal, 1 refused, 0 not buildable, 0 error, 0 different"


def test_the_command_prints_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    """JSON and table hold the same; only a difference or an error makes the exit code 1."""
    monkeypatch.setattr(command, "outcomes", lambda types, jobs, timeout: iter(OUTCOMES))
    page = tmp_path / "families.md"

    code = command.run_sweep(["llama", "gpt2"], json=True, markdown=page)
    printed = json.loads(capsys.readouterr().out)
    table_code = command.run_sweep(["llama", "gpt2"])

    assert (code, table_code) == (0, 0)
    assert [family["model_type"] for family in printed["families"]] == ["a", "b"]
    assert page.read_text() == markdown_page(OUTCOMES)
    assert "no | way" in capsys.readouterr().out


@pytest.mark.parametrize("status", [Status.ERROR, Status.DIFFERENT])
def test_the_command_fails_on_a_difference(monkeypatch: pytest.MonkeyPatch, status: Status) -> None:
    """A sweep in CI must not pass over one."""
    monkeypatch.setattr(
        command, "outcomes", lambda types, jobs, timeout: iter([Outcome(model_type="llama", status=status, reason="x")])
    )

    assert command.run_sweep(["llama"]) == 1


def test_the_command_knows_the_types() -> None:
    """A misspelt one is told, with the nearest."""
    with pytest.raises(UnknownNameError, match="did you mean 'llama'"):
        command.run_sweep(["lama"])
