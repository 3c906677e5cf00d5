"""A budget that holds the whole context gives what plain `generate` gives, with the retrieval path running."""

import functools
from typing import Any

import pytest
from hf.tiny import Answer, Prompt, assert_same, generate, louiskv, model_of, tight

import kvframe
from kvframe import Policy
from kvframe.report import Report

NUM_STEPS = 65  # the first token comes from the prompt
FAMILIES = ("Llama", "Qwen2", "Qwen3", "Gemma3", "Mixtral")
ONE_SHOT: dict[str, Any] = {}
CHUNKED = {"prefill_chunk_size": 16}


@functools.cache
def plain(family: str) -> Answer:
    """Two rows, one of them with left padding, by the model as it is."""
    return generate(model_of(family), max_new_tokens=NUM_STEPS)


def attached(family: str, policy: Policy, **changes: Any) -> tuple[Answer, Report]:
    """The same under a policy, and its report."""
    with kvframe.attach(model_of(family), policy) as run:
        answer = generate(model_of(family), max_new_tokens=NUM_STEPS, **changes)
    return answer, run.report()


def assert_retrieved(report: Report, num_layers: int) -> None:
    """Every layer selected, and what was selected had to come from the host."""
    assert len(report.layers) == num_layers
    for layer in report.layers:
        assert layer.num_steps == NUM_STEPS - 1
        assert layer.selections > 0 and layer.rows_selected > 0 and layer.rows_recalled > 0
        assert layer.bytes_to_host > 0 and layer.bytes_to_device > 0


@pytest.mark.parametrize("prefill", [ONE_SHOT, CHUNKED], ids=["one-shot", "chunked"])
@pytest.mark.parametrize("tau", [2.0, 0.7], ids=["every-step", "semantic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_louiskv(family: str, tau: float, prefill: dict[str, Any]) -> None:
    """LouisKV with room for everything gives the tokens and logits of plain generate."""
    answer, report = attached(family, louiskv(tau=tau), **prefill)

    assert_same(answer, plain(family))
    assert_retrieved(report, num_layers=2)
    assert (report.retrieval_rate == 1.0) == (tau == 2.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_matters(family: str) -> None:
    """With room for a part of it the logits are others, so that being equal says something."""
    answer, report = attached(family, tight())

    assert float((answer.logits[:, 1:] - plain(family).logits[:, 1:]).abs().max()) > 0.1
    assert_retrieved(report, num_layers=2)


@pytest.mark.parametrize("prefill", [ONE_SHOT, CHUNKED], ids=["one-shot", "chunked"])
@pytest.mark.parametrize(
    "policy",
    [
        kvframe.policy("full"),
        kvframe.policy("window", window_size=128),
        kvframe.policy("oracle_topk", token_budget=128, sink_size=2, window_size=8, dense_layers=(0,)),
    ],
    ids=lambda policy: policy.name,
)
def test_other_policies(policy: Policy, prefill: dict[str, Any]) -> None:
    """Any policy that attends to everything gives what plain generate gives."""
    answer, _ = attached("Llama", policy, **prefill)

    assert_same(answer, plain("Llama"))


def test_full_and_window_retrieve_nothing() -> None:
    """Full attention has no layer under a policy's stages; a window attends to sinks and window alone."""
    _, full = attached("Llama", kvframe.policy("full"))
    _, window = attached("Llama", kvframe.policy("window", sink_size=3, window_size=8))

    assert full.layers == ()
    assert full.bytes_to_host == full.host_kv_bytes == 0
    assert (window.rows_selected, window.rows_recalled, window.bytes_to_device) == (0, 0, 0)
    assert window.attended_total == 3 + 8
    assert window.bytes_to_host > 0


def test_the_oracle_attends_to_its_budget() -> None:
    """Exact top-k of single tokens meets the budget at every step."""
    policy = kvframe.policy("oracle_topk", token_budget=10, sink_size=2, window_size=8, dense_layers=())
    _, report = attached("Llama", policy)

    assert (report.attended_sinks, report.attended_retrieved, report.attended_window) == (2, 10, 8)
    assert report.retrieval_rate == 1.0


def test_dense_layers_are_left_out() -> None:
    """A dense layer attends to everything and does not appear among the retrieval layers."""
    answer, report = attached("Gemma3", louiskv(dense_layers=(1,)))

    assert_same(answer, plain("Gemma3"))
    assert [layer.layer_idx for layer in report.layers] == [3]


@pytest.mark.model
def test_smollm2(smollm2: Any) -> None:
    """The same holds on a trained model, with a prompt of a few hundred tokens."""
    model, prompt = smollm2.model, smollm2_prompt(smollm2.tokenizer)
    expected = generate(model, prompt, max_new_tokens=NUM_STEPS)
    policy = louiskv(512, tau=0.7, cluster_size=16, window_size=32, dense_layers=(0, 1))

    with kvframe.attach(model, policy) as run:
        answer = generate(model, prompt, max_new_tokens=NUM_STEPS, prefill_chunk_size=128)

    assert_same(answer, expected)
    assert_retrieved(run.report(), num_layers=28)


def smollm2_prompt(tokenizer: Any) -> Prompt:
    """Two texts of different length, the shorter one with padding on the left."""
    sentences = [f"The locker with the number {number} belongs to team {number % 7}." for number in range(20)]
    texts = [" ".join(sentences), " ".join(sentences[:15])]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    assert 200 < encoded.input_ids.shape[1] < 500 and int(encoded.attention_mask[1, 0]) == 0
    return Prompt(encoded.input_ids, encoded.attention_mask)
