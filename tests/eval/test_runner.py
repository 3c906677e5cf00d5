"""`evaluate`: the figures of one cell."""

import json
from typing import Any

import pytest
import torch
from eval.conftest import Tiny
from hf.tiny import louiskv, tight

import kvframe
from kvframe.errors import ConfigError, UnknownNameError
from kvframe.eval import DEFAULT_METRICS, METRICS, evaluate, full_logits, run_forced, task
from kvframe.eval.fidelity import compare_logits

COPY = task("copy", copy_tokens=30)
CONTEXT = 400


def figures(tiny: Tiny, policy: kvframe.Policy, *metrics: str, **changes: Any) -> dict[str, Any]:
    """A cell on the short copy, all metrics unless some are named."""
    options: dict[str, Any] = {"context": CONTEXT, "haystack": tiny.haystack, "metrics": metrics or tuple(METRICS)}
    return evaluate(tiny.model, tiny.tokenizer, policy, changes.pop("task", COPY), **options | changes)


def test_every_figure_is_there_and_repeats(tiny: Tiny):
    """Plain data; the same again, timings aside."""
    one, other = figures(tiny, tight()), figures(tiny, tight())

    assert list(one) == list(METRICS) and json.loads(json.dumps(one)) == one
    for name, metric in METRICS.items():
        assert metric.summary and (metric.is_timing or one[name] == other[name]), name
    assert set(evaluate(tiny.model, tiny.tokenizer, tight(), COPY, context=CONTEXT)) == set(DEFAULT_METRICS)
    assert one["score"] != figures(tiny, tight(), "score", seed=1) or one["kl"] != figures(tiny, tight(), "kl", seed=1)


def test_full_attention_has_no_distance(tiny: Tiny):
    """Under `full`, and under a budget beyond the text."""
    for policy in (kvframe.policy("full"), louiskv(token_budget=CONTEXT)):
        found = figures(tiny, policy)
        assert found["kl"] < 1e-9 and found["kl_all"] < 1e-9 and abs(found["nll_difference"]) < 1e-9
        assert found["top1_agreement"] == 1 and found["score"] == found["score_full"]
    assert found["captured_mass"] == pytest.approx(1) and found["oracle_recall"] == 1
    assert figures(tiny, kvframe.policy("full"), "captured_mass")["captured_mass"] is None


def test_figures_are_those_of_the_run(tiny: Tiny):
    """Against the pieces that they are made of."""
    found = figures(tiny, tight())
    sample = COPY.make(tiny.tokenizer, CONTEXT, 0, tiny.haystack)
    run = run_forced(tiny.model, tight(), sample)
    report = run.report()
    fidelity = compare_logits(full_logits(tiny.model, sample), run.logits, sample.targets)

    assert found["kl"] == found["kl_all"] == float(fidelity.kl.mean()) > 1e-4  # every token is an answer
    assert found["kl_by_token"] == fidelity.kl.tolist()
    assert found["score"] == float(fidelity.correct.double().mean())
    assert found["nll_difference"] == pytest.approx(found["nll"] - found["nll_full"])
    assert found["perplexity"] == pytest.approx(float(fidelity.nll.mean().exp()))
    assert (
        found["attended_total"]
        == report.attended_total
        == sum(found[f"attended_{kind}"] for kind in ("sinks", "retrieved", "window"))
    )
    assert found["bytes_per_token"] == report.bytes_to_device_per_step > 0
    assert found["retrieval_rate_by_layer"] == {str(layer.layer_idx): layer.retrieval_rate for layer in report.layers}
    assert sum(found["segment_lengths"].values()) > 0 and sum(found["prompt_unit_sizes"].values()) > 0
    assert found["tokens_per_second"] > 0 and found["peak_memory"] is None


def test_heads_average_to_the_whole(tiny: Tiny):
    """Captured mass and recall by layer and head."""
    found = figures(tiny, tight(dense_layers=(1,)))
    for name in ("captured_mass", "oracle_recall"):
        by_head = found[f"{name}_by_head"]
        assert list(by_head) == ["0", "2"] and all(len(heads) == 2 for heads in by_head.values())
        assert found[name] == pytest.approx(sum(map(sum, by_head.values())) / 4) and 0 < found[name] < 1


def test_answers_alone(tiny: Tiny):
    """KL of a task with answers is that of their tokens; without answers it is that of all."""
    needles = figures(tiny, tight(), "kl", "kl_all", "num_answers", task=task("niah_multiquery", num_needles=2))

    assert needles["kl"] != needles["kl_all"] and needles["num_answers"] == 2


def test_a_free_generation(tiny: Tiny):
    """Scored by the task, after the same prompt."""
    found = figures(tiny, kvframe.policy("full"), "generated_score", "generated_text")
    sample = COPY.make(tiny.tokenizer, CONTEXT, 0, tiny.haystack)
    ids = sample.turns[0].prompt_ids[None]
    out = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)

    assert found["generated_text"] == tiny.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert sample.scorer is not None and found["generated_score"] == sample.scorer(found["generated_text"])


def test_before_anything_runs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    """An unknown metric, a context beyond the model's."""
    monkeypatch.setattr(tiny.model, "forward", None)

    with pytest.raises(UnknownNameError, match="there is no metric 'captured-mas'; did you mean 'captured_mass'?"):
        figures(tiny, tight(), "captured-mas")
    with pytest.raises(ConfigError, match="task copy has 5000 tokens, the model reads at most 4096"):
        figures(tiny, tight(), context=5000)
