"""Thresholds for a wanted retrieval rate, and the watching of queries that they come from."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
)

import kvframe
from kvframe.calibration import Calibration, calibrate, threshold
from kvframe.demo import prose_topics
from kvframe.errors import ConfigError, UnsupportedModelError
from kvframe.hf.queries import observe_queries
from kvframe_louis import SemanticTrigger

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    # Random layers that do something; with the usual 0.02 all queries would be alike.
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def build(config_cls: type[PretrainedConfig] = LlamaConfig, *, attention: str = "sdpa", **options: Any) -> Any:
    """A tiny random model."""
    torch.manual_seed(0)
    config = config_cls(**(SIZES | options))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny random Llama that no test changes."""
    return build()


def text(num_tokens: int, seed: int = 0) -> Tensor:
    """Random tokens [T]."""
    return torch.randint(VOCABULARY, (num_tokens,), generator=torch.Generator().manual_seed(seed))


# ---- the threshold --------------------------------------------------------------------------------------------------


@given(
    r=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=60, unique=True),
    rate=st.floats(0.001, 0.999),
)
def testthreshold_is_the_quantile(r: list[float], rate: float) -> None:
    """Strictly below it lies the share that is wanted, to the nearest sample."""
    below = sum(value < threshold(torch.tensor(r), rate) for value in r)

    assert below == round(rate * len(r))


def testthreshold_lies_between_neighbours() -> None:
    """Rounding of a cosine flips no decision."""
    assert threshold(torch.tensor([0.1, 0.2, 0.4, 0.8]), 0.5) == pytest.approx(0.3)


def testthresholds_of_the_ends() -> None:
    """Where no sample, or every sample, is to lie below."""
    r = torch.tensor([-1.0, 1.0])

    assert threshold(r, 0.01) <= -1 and threshold(r, 0.99) > 1


# ---- calibrate ------------------------------------------------------------------------------------------------------


def test_rate_is_met_in_every_layer(model: Any) -> None:
    """On the text that tau comes from, each layer fires as often as wanted, to one sample."""
    found = calibrate(model, [text(300)], retrieval_rate=0.1)

    assert isinstance(found.tau, tuple) and len(found.tau) == 4
    assert len(set(found.tau)) == 4
    assert found.num_samples == 299 and found.retrieval_rate == 0.1 and found.rope == "after"
    assert all(rate == pytest.approx(0.1, abs=0.5 / 299 + 1e-9) for rate in found.achieved)


def test_one_tau_for_the_model(model: Any) -> None:
    """The rate is met over all layers; each of them may differ."""
    found = calibrate(model, [text(300)], retrieval_rate=0.1, per="model")

    assert isinstance(found.tau, float)
    rates = [rate for rate in found.achieved if rate is not None]
    assert sum(rates) / 4 == pytest.approx(0.1, abs=0.5 / (4 * 299) + 1e-9)
    assert max(rates) > min(rates)


def test_dense_layers_do_not_count(model: Any) -> None:
    """One tau for the model looks at the layers that retrieve."""
    found = calibrate(model, [text(300)], retrieval_rate=0.1, per="model", dense_layers=(0, 3))

    assert found.achieved[1] is not None and found.achieved[2] is not None
    assert (found.achieved[1] + found.achieved[2]) / 2 == pytest.approx(0.1, abs=0.002)


def test_similarity_is_that_of_the_queries(model: Any) -> None:
    """r before RoPE is the mean cosine of neighbouring outputs of q_proj, which never saw a position."""
    ids, layer, raw = text(50), 2, []
    hook = model.model.layers[layer].self_attn.q_proj.register_forward_hook(lambda *call: raw.append(call[2]))
    with torch.no_grad():
        model(ids[None])
    hook.remove()
    steps = raw[0].view(50, 4, 8)
    r = F.cosine_similarity(steps[1:], steps[:-1], dim=-1).mean(-1).sort().values

    before = calibrate(model, [ids], retrieval_rate=0.5, rope="before")
    after = calibrate(model, [ids], retrieval_rate=0.5)

    assert isinstance(before.tau, tuple) and isinstance(after.tau, tuple)
    below = round(0.5 * 49)
    assert before.tau[layer] == pytest.approx(float(r[below - 1] + r[below]) / 2, abs=1e-5)
    assert before.tau[layer] != pytest.approx(after.tau[layer], abs=1e-5)


def test_texts_do_not_touch(model: Any) -> None:
    """Neighbours of two texts, or of two pieces, are no pair; every form of a text is understood."""
    parts = [text(40, seed) for seed in range(3)]
    found = calibrate(model, [parts[0], parts[1][None], parts[2].tolist(), [5], []])

    assert found.num_samples == 3 * 39
    assert found == calibrate(model, [torch.cat(parts)], chunk_size=40)


def test_progress_reaches_the_end(model: Any) -> None:
    """It grows in small steps and ends at the whole."""
    calls: list[tuple[int, int]] = []
    calibrate(model, [text(90)], chunk_size=30, progress=lambda done, total: calls.append((done, total)))

    assert len(calls) == 4 * 3 and calls[-1] == (4 * 90, 4 * 90)
    assert all(first[0] < second[0] for first, second in pairwise(calls))


def test_layers_without_a_full_cache() -> None:
    """Sliding layers have a place in the tuple, with a threshold that never fires and no rate."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    found = calibrate(build(Gemma3TextConfig, layer_types=kinds, sliding_window=16), [text(60)], retrieval_rate=0.2)

    assert isinstance(found.tau, tuple)
    assert [tau == -1.0 for tau in found.tau] == [kind == "sliding_attention" for kind in kinds]
    assert [rate is None for rate in found.achieved] == [kind == "sliding_attention" for kind in kinds]


@pytest.mark.parametrize("per", ["layer", "model"])
def test_round_trip_through_json(per: Any, model: Any, tmp_path: Any) -> None:
    """A calibration is plain data, and a policy takes its tau."""
    found = calibrate(model, [text(50)], per=per)
    found.save(tmp_path / "tau.json")

    assert Calibration.load(tmp_path / "tau.json") == found
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    policy = kvframe.policy("louiskv", tau=found.tau, dense_layers=())
    with kvframe.attach(model, policy) as run:
        ids = text(50)[None]
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert run.report().num_decode_steps == 2


def test_calibrate_is_a_name_of_kvframe() -> None:
    """`kvframe.calibrate` is the function, before and after its module is imported."""
    command = (
        "import kvframe; first = kvframe.calibrate; import kvframe.calibration; "
        "assert first is kvframe.calibrate is kvframe.calibration.calibrate"
    )
    subprocess.run([sys.executable, "-P", "-c", command], check=True, timeout=60)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"retrieval_rate": 0.0}, "between 0 and 1, got 0.0"),
        ({"retrieval_rate": 1.0}, "between 0 and 1"),
        ({"retrieval_rate": float("nan")}, "between 0 and 1"),
        ({"per": "head"}, "per must be one of 'layer', 'model'; got 'head'"),
        ({"rope": "during"}, "rope must be one of 'after', 'before'"),
        ({"chunk_size": 1}, "chunk_size must be at least 2, got 1"),
        ({"per": "model", "dense_layers": range(4)}, "dense_layers names every layer"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str, model: Any) -> None:
    """Each is named with what came."""
    with pytest.raises(ConfigError, match=words):
        calibrate(model, [text(10)], **options)


@pytest.mark.parametrize(
    "texts, words",
    [
        ([], "nothing to calibrate on"),
        ([[7]], "nothing to calibrate on"),
        ([torch.zeros(2, 5, dtype=torch.long)], r"got torch.int64 \[2, 5\]; pass one text after the other"),
        ([torch.zeros(5)], "got torch.float32"),
    ],
)
def test_bad_texts(texts: Any, words: str, model: Any) -> None:
    """Texts are token ids, one after the other."""
    with pytest.raises(ConfigError, match=words):
        calibrate(model, texts)


def test_models_that_cannot_be_served() -> None:
    """A model without a rotary embedding has no queries before it; an encoder-decoder no policy at all."""
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(ConfigError, match="rope='after'"):
        calibrate(gpt2, [text(10)], rope="before")
    assert len(calibrate(gpt2, [text(30)]).achieved) == 2

    from transformers import T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(UnsupportedModelError):
        calibrate(t5, [text(10)])


# ---- watching queries -----------------------------------------------------------------------------------------------


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """The model is afterwards what it was before, and computes the same."""
    ids = text(20)[None]

    def state() -> Any:
        configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
        return [config._attn_implementation for config in configs], {
            name: id(value) for name, value in vars(model).items()
        }

    with torch.no_grad():
        before, logits = state(), model(ids).logits
        yield
        assert state() == before
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config_cls", [LlamaConfig, Qwen3Config, Gemma3TextConfig])
def test_watching_changes_nothing(config_cls: type[PretrainedConfig], attention: str) -> None:
    """Same logits to the last bit, with padding and a cache too; every layer is seen in order."""
    model, seen = build(config_cls, attention=attention), []
    ids = text(20)[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with unchanged(model), torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        with observe_queries(model, lambda layer, query: seen.append((layer, tuple(query.shape)))):
            assert torch.equal(model(**inputs).logits, logits)
            assert seen == [(layer, (2, 4, 20, 8)) for layer in range(4)]
            assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


def test_model_is_restored_after_an_exception(model: Any) -> None:
    """Also when the observer, or the caller, fails."""

    def fail(layer: int, query: Tensor) -> None:
        raise KeyError(layer)

    with unchanged(model):
        with pytest.raises(KeyError), observe_queries(model, fail):
            model(text(5)[None])
        with pytest.raises(ZeroDivisionError), observe_queries(model, lambda layer, query: None):
            raise ZeroDivisionError


def test_one_at_a_time(model: Any) -> None:
    """A model that is watched or attached cannot be watched; what was begun goes on."""
    with unchanged(model):
        with observe_queries(model, lambda layer, query: None):
            with pytest.raises(ConfigError, match="attached or watched already"):
                calibrate(model, [text(10)])
            with (
                pytest.raises(ConfigError, match="leave that block first"),
                kvframe.attach(model, kvframe.policy("full")),
            ):
                pass
        with kvframe.attach(model, kvframe.policy("full")), pytest.raises(ConfigError, match="attached or watched"):
            calibrate(model, [text(10)])


def test_two_models_at_once() -> None:
    """Each shows its queries to its own observer."""
    first, second, seen = build(), build(Qwen3Config), []
    with (
        observe_queries(first, lambda layer, query: seen.append("first")),
        observe_queries(second, lambda layer, query: seen.append("second")),
        torch.no_grad(),
    ):
        second(text(5)[None])
        first(text(5)[None])

    assert seen == ["second"] * 4 + ["first"] * 4


# ---- the rate while decoding ----------------------------------------------------------------------------------------


def rates_in_shadow(model: Any, ids: Tensor, num_prompt: int, tau: float | tuple[float, ...], rope: str) -> list[float]:
    """How often each layer fires while a text [T] is decoded token by token; the first step always does."""
    policy = kvframe.policy(
        "louiskv", tau=tau, rope=rope, sink_size=4, window_size=16, token_budget=32, dense_layers=()
    )
    with kvframe.attach(model, policy, execution="shadow") as run, torch.no_grad():
        cache = run.new_cache(len(ids))
        for tokens in (ids[:num_prompt], *ids[num_prompt:].split(1)):
            model(tokens[None], past_key_values=cache)
    return [(layer.selections / 2 - 1) / (layer.num_steps - 1) for layer in cache.report().layers]


@pytest.mark.parametrize("rope", ["after", "before"])
def test_rate_on_other_text(rope: Any, model: Any) -> None:
    """Decoding text that tau has not seen fires as often as wanted.

    The tokens are random, so steps are as good as independent: over n = 300 of them a rate of 0.2 has a standard error
    of 0.023, and that of tau, from 2,000, adds little. Four of these is 0.1 for a layer, 0.05 for the mean of four.
    """
    found = calibrate(model, [text(2000)], retrieval_rate=0.2, rope=rope, chunk_size=500)

    rates = rates_in_shadow(model, text(350, seed=1), 50, found.tau, rope)

    assert rates == pytest.approx([0.2] * 4, abs=0.1)
    assert sum(rates) / 4 == pytest.approx(0.2, abs=0.05)


def test_trigger_sees_what_calibrate_saw(model: Any) -> None:
    """On the same text, decoding fires exactly as often as calibrate says: nothing but the path differs."""
    ids = text(150)
    found = calibrate(model, [ids], retrieval_rate=0.3)
    num_prompt = 2  # the step after it is the first one, which always fires

    rates = rates_in_shadow(model, ids, num_prompt, found.tau, "after")

    # At most the two pairs that the prompt and the first step take can be missing.
    for rate, achieved in zip(rates, found.achieved, strict=True):
        assert achieved is not None
        assert abs(rate * 147 - achieved * 149) <= 2 + 1e-6


# ---- a trigger with other options -----------------------------------------------------------------------------------

GUARDED = {
    "heads": {"heads": "kv-head"},
    "age and hysteresis": {"max_age": 5, "hysteresis": 0.05},
    "all": {"heads": "kv-head", "max_age": 6, "anchor": 0.0, "hysteresis": 0.05, "ahead": True},
}


def rates_of(model: Any, ids: Tensor, num_prompt: int, trigger: SemanticTrigger) -> list[float]:
    """How often each layer's heads fire while a text [T] is decoded token by token, the first step left out."""
    policy = kvframe.policy("louiskv", sink_size=4, window_size=16, token_budget=32, dense_layers=())
    with kvframe.attach(model, policy.swap(trigger=trigger), execution="shadow") as run, torch.no_grad():
        cache = run.new_cache(len(ids))
        for tokens in (ids[:num_prompt], *ids[num_prompt:].split(1)):
            model(tokens[None], past_key_values=cache)
    # What the last step selected for a next one is not counted.
    return [(layer.selections / 2 - 1) / (layer.num_steps - 1 - trigger.ahead) for layer in cache.report().layers]


@pytest.mark.parametrize("name, per", [("heads", "model"), ("age and hysteresis", "layer"), ("all", "layer")])
def test_all_of_a_trigger_fires_at_the_rate(name: str, per: Any, model: Any) -> None:
    """Whatever its options, decoding the same text fires as often as calibrate says, and that is what was wanted."""
    ids = text(100)
    trigger = SemanticTrigger(**GUARDED[name])
    found = calibrate(model, [ids], retrieval_rate=0.25, trigger=trigger, per=per)
    assert (found.anchor is not None) == (trigger.anchor is not None) and found.rope == trigger.rope
    set_to = {key: value for key, value in found.options.items() if key != "rope"}

    rates = rates_of(model, ids, 1, evolve(trigger, **set_to))

    # Of a trigger that selects ahead, the selection for a step that does not come is not in the report.
    assert rates == pytest.approx(found.achieved, abs=1.01 / 98 if trigger.ahead else 1e-9)
    assert sum(rates) / 4 == pytest.approx(0.25, abs=0.03)
    if per == "layer":
        assert rates == pytest.approx([0.25] * 4, abs=0.04)


def test_a_trigger_without_options(model: Any) -> None:
    """It needs no search: tau is the quantile that it is without naming the trigger."""
    ids = text(300)
    plain = calibrate(model, [ids], retrieval_rate=0.2)
    found = calibrate(model, [ids], retrieval_rate=0.2, trigger=SemanticTrigger())

    assert found.tau == plain.tau and found.anchor is None


@pytest.mark.parametrize(
    "trigger, words",
    [
        (kvframe.EveryStep(), "has no tau to be calibrated"),
        (SemanticTrigger(max_age=2), r"fire on 10.0% of the steps in layer 0: it comes as near as 5\d.\d%"),
    ],
)
def test_triggers_that_cannot(trigger: kvframe.Trigger, words: str, model: Any) -> None:
    """One without a threshold, and one that fires more often whatever the threshold."""
    with pytest.raises(ConfigError, match=words):
        calibrate(model, [text(60)], retrieval_rate=0.1, trigger=trigger)


def test_a_dense_layer_may_miss_the_rate(model: Any) -> None:
    """It gets what comes nearest; a layer that retrieves may not."""
    trigger, texts = SemanticTrigger(max_age=2), [text(60)]
    with pytest.raises(ConfigError, match="in layer 3: it comes as near as"):
        calibrate(model, texts, retrieval_rate=0.1, trigger=trigger, dense_layers=(0, 1, 2))
    found = calibrate(model, texts, retrieval_rate=0.1, trigger=trigger, dense_layers=(0, 1, 2, 3))

    assert all(rate is not None and rate > 0.45 for rate in found.achieved)


def test_a_file_from_before_anchors(model: Any) -> None:
    """What knows of no anchor is read as having none."""
    data = calibrate(model, [text(50)]).to_dict()
    del data["anchor"]

    assert Calibration.from_dict(data).options == {"tau": tuple(data["tau"]), "rope": "after"}


@pytest.mark.model
def test_rate_on_other_prose(smollm2: Any) -> None:
    """The same on SmolLM2 and prose.

    Prose is no coin: neighbouring steps and layers go together, and topics differ. Over 40 steps the standard error of
    one layer is 0.07 at least; the mean over 30 layers, of which perhaps five are independent, stays within 0.1.
    """
    topics = prose_topics()
    ids = smollm2.tokenizer("\n\n".join(topics), add_special_tokens=False, verbose=False)["input_ids"]
    found = calibrate(smollm2.model, [ids[:384]], retrieval_rate=0.25)

    rates = rates_in_shadow_of_prose(smollm2.model, torch.tensor(ids[5000:5105]), found)

    assert len(rates) == 30
    assert sum(rates) / len(rates) == pytest.approx(0.25, abs=0.1)


def rates_in_shadow_of_prose(model: Any, ids: Tensor, found: Calibration) -> list[float]:
    """As `rates_in_shadow`, for three KV heads."""
    policy = kvframe.policy("louiskv", tau=found.tau, sink_size=4, window_size=16, token_budget=32, dense_layers=())
    with kvframe.attach(model, policy, execution="shadow") as run, torch.no_grad():
        cache = run.new_cache(len(ids))
        for tokens in (ids[:64], *ids[64:].split(1)):
            model(tokens[None], past_key_values=cache)
    return [(layer.selections / 3 - 1) / (layer.num_steps - 1) for layer in cache.report().layers]
