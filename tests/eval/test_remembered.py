"""What is remembered of full attention: it is computed once, and it is what would be computed."""

import copy
import gc

import pytest
import torch
from eval.conftest import Tiny
from eval.test_forced import random_sample
from hf.tiny import louiskv, tight

import kvframe
from kvframe.eval import METRICS, Sample, Turn, evaluate, remembered, task
from kvframe.eval.forced import full_logits
from kvframe.eval.remembered import RememberedLogits


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """The samples that full attention was computed for; nothing is remembered from before."""
    seen: list[Sample] = []

    def count(model: object, sample: Sample) -> torch.Tensor:
        seen.append(sample)
        return full_logits(model, sample)  # type: ignore[arg-type]

    monkeypatch.setattr(remembered, "full_logits", count)
    monkeypatch.setattr("kvframe.eval.runner.remembered_logits", RememberedLogits())
    return seen


def test_policies_share_it(tiny: Tiny, computed: list[Sample], monkeypatch: pytest.MonkeyPatch):
    """Several policies on a sample compute it once, and have the figures that each has alone."""
    policies = (tight(), louiskv(), kvframe.policy("full"))
    settled = [name for name, metric in METRICS.items() if not metric.is_timing and metric.needs == "forced"]

    def figures(policy: kvframe.Policy, seed: int) -> dict[str, object]:
        options = {"context": 400, "seed": seed, "haystack": tiny.haystack, "metrics": settled}
        return evaluate(tiny.model, tiny.tokenizer, policy, task("copy", copy_tokens=8), **options)  # type: ignore[arg-type]

    together = [figures(policy, seed) for seed in (0, 1) for policy in policies]
    assert len(computed) == 2

    alone = []
    for seed in (0, 1):
        for policy in policies:
            monkeypatch.setattr("kvframe.eval.runner.remembered_logits", RememberedLogits())
            alone.append(figures(policy, seed))
    assert len(computed) == 2 + 6 and together == alone


def test_what_it_depends_on(tiny: Tiny, computed: list[Sample]):
    """Another text, other places in it, written weights, another dtype, another model: computed anew each time."""
    model, memory = copy.deepcopy(tiny.model), RememberedLogits()
    text = random_sample((60, 9)).ids[0]
    parts = text.split([40, 5, 20, 4])
    turns = (Turn(prompt_ids=parts[0], continuation_ids=parts[1]), Turn(prompt_ids=parts[2], continuation_ids=parts[3]))
    samples = [random_sample((60, 9)), random_sample((60, 9), seed=1), Sample(turns=turns)]

    def is_new(sample: Sample) -> bool:
        before = len(computed)
        assert torch.equal(memory.of(model, sample), full_logits(model, sample))
        return len(computed) > before

    assert [is_new(sample) for sample in [*samples, *samples]] == [True] * 3 + [False] * 3
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[-1, -1] += 1
    assert is_new(samples[0]) and not is_new(samples[0])
    model.float()
    assert is_new(samples[0]) and not is_new(samples[0])
    model = copy.deepcopy(model)
    assert is_new(samples[0]) and not is_new(samples[0])


def test_it_has_bounds(tiny: Tiny, computed: list[Sample], monkeypatch: pytest.MonkeyPatch):
    """The last used samples stay, as many as fit, and at least the last; a model that is gone takes its own along."""
    model, memory = copy.deepcopy(tiny.model), RememberedLogits()
    samples = [random_sample((20, 3), seed=seed) for seed in range(5)]
    for sample in (*samples[:4], samples[0], samples[4]):
        memory.of(model, sample)
    assert len(computed) == 5
    memory.of(model, samples[0])
    assert len(computed) == 5  # used in between, so the oldest was another
    memory.of(model, samples[1])
    assert len(computed) == 6

    monkeypatch.setattr(remembered, "MOST_BYTES", 1)
    memory.of(model, samples[2])
    memory.of(model, samples[2])
    memory.of(model, samples[1])
    assert len(computed) == 8

    del model
    gc.collect()
    memory.of(tiny.model, samples[0])
    assert len(memory._entries) == 1
