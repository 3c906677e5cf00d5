"""A trace replayed against a live run in `shadow` execution over the same text."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from eval.conftest import Tiny, make_tiny
from eval.test_forced import SAMPLE, TURNS
from helpers import policy_records, record_id
from hf.tiny import louiskv, make_model, tight
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import kvframe
import kvframe_louis
from kvframe.errors import ConfigError
from kvframe.eval import Sample, haystack, load_trace, record, replay, run_forced, save_trace, task
from kvframe.eval.replaying import Replayed
from kvframe.eval.trace import Trace, choose_layers
from kvframe.registry import PolicyRecord
from kvframe.runtime import RetrievalLayer
from kvframe.testing.small import small_policy

SAMPLES = {"one turn": SAMPLE, "three turns": TURNS}


def assert_as_live(found: Replayed, model: Any, policy: kvframe.Policy, sample: Sample, tolerance: float) -> None:
    """Counts as in a live run, layer by layer, and masses up to rounding."""
    run = run_forced(model, policy, sample, execution="shadow")
    report = run.report()
    live = {layer.layer_idx: layer for layer in report.layers}
    assert {layer.layer_idx for layer in found.layers} <= set(live)
    for layer in found.layers:
        expected = live[layer.layer_idx]
        assert layer.rows_selected == expected.rows_selected and layer.rows_recalled == expected.rows_recalled
        assert sum(layer.retrieval_rate) / len(layer.retrieval_rate) == pytest.approx(expected.retrieval_rate)
        for name in ("captured_mass", "oracle_recall"):
            heads = getattr(layer, name)
            assert sum(heads) / len(heads) == pytest.approx(getattr(expected, name), abs=tolerance)
        total = expected.attended_sinks + expected.attended_retrieved + expected.attended_window
        assert layer.attended_total == pytest.approx(total)


@functools.cache
def make_traces() -> dict[str, Trace]:
    """Every layer of the tiny model over both samples."""
    return {name: record(make_tiny().model, sample, layers=range(3)) for name, sample in SAMPLES.items()}


@pytest.fixture
def traces() -> dict[str, Trace]:
    """Shared by all tests."""
    return make_traces()


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("policy_record", policy_records(), ids=record_id)
def test_every_policy_as_in_a_live_run(policy_record: PolicyRecord, text: str, tiny: Tiny, traces: dict[str, Trace]):
    """In float64 the figures are the same; under a policy whose layers are all dense there are none."""
    policy = small_policy(policy_record)
    (found,) = replay(traces[text], [policy])
    if policy.dense_layers == "all":
        assert found.layers == () and found.captured_mass is None and found.bytes_per_token == 0
    else:
        assert len(found.layers) == 3 - len(policy.dense_layers)
        assert_as_live(found, tiny.model, policy, SAMPLES[text], 1e-9)


def test_triggers_that_see_queries_before_rope(tiny: Tiny, traces: dict[str, Trace]):
    """The trace holds what turning a query needs."""
    policy = tight(tau=0.4).swap(trigger=kvframe_louis.SemanticTrigger(tau=0.4, rope="before"))
    (found,) = replay(traces["one turn"], [policy])

    assert_as_live(found, tiny.model, policy, SAMPLE, 1e-9)
    assert found.retrieval_rate is not None and 1 / SAMPLE.num_steps < found.retrieval_rate < 1


@settings(max_examples=8)
@given(budget=st.integers(4, 60))
def test_the_oracle_is_the_best(budget: int):
    """What the oracle policy holds, sinks and window aside, is never more than the heaviest tokens hold; with nothing
    kept aside but one recent token it is nearly that. More budget holds more and errs less."""
    trace = make_traces()["one turn"]
    options = {"sink_size": 0, "window_size": 1, "dense_layers": ()}
    policies = [kvframe.policy("oracle_topk", token_budget=n, **options) for n in (budget, budget + 20)]
    small, large = replay(trace, policies)

    for found in (small, large):
        assert found.captured_mass is not None and found.oracle_mass is not None
        assert 0.9 * found.oracle_mass <= found.captured_mass <= found.oracle_mass + 1e-12
    assert small.captured_mass <= large.captured_mass + 1e-12
    assert small.oracle_mass < large.oracle_mass


def test_output_error_is_that_of_the_dense_execution(traces: dict[str, Trace]):
    """Attention of a layer in `dense` execution fed with the same tensors, against plain softmax attention."""
    trace, policy = traces["one turn"], tight()
    (found,) = replay(trace, [policy])
    for recorded, figures in zip(trace.layers, found.layers):
        layer = RetrievalLayer(trace.layout(recorded), policy, trace.num_tokens, "dense")
        ((num_prompt, num_steps),) = trace.turns
        layer.prompt(*recorded.span(0, num_prompt), [num_prompt], num_prompt)
        difference, norm = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for step in range(num_prompt, num_prompt + num_steps):
            out = layer.decode(*recorded.span(step, step + 1))[0, :, 0]
            for qo_head in range(4):
                keys, values = recorded.keys[qo_head // 2, : step + 1], recorded.values[qo_head // 2, : step + 1]
                weights = torch.softmax(keys @ recorded.query[qo_head, step] * recorded.sm_scale, 0)
                expected = weights @ values
                difference[qo_head // 2] += (out[qo_head] - expected).square().sum()
                norm[qo_head // 2] += expected.square().sum()
        assert figures.output_error == pytest.approx((difference / norm).sqrt().tolist())


def test_a_budget_beyond_the_text(traces: dict[str, Trace]):
    """Holds everything, errs nowhere."""
    (found,) = replay(traces["three turns"], [louiskv()])

    assert found.captured_mass == pytest.approx(1) and found.oracle_recall == 1
    assert found.output_error == pytest.approx(0, abs=1e-9)


def test_bytes_and_time(tiny: Tiny, traces: dict[str, Trace]):
    """Bytes are those that `offload` counts, for all layers of the model, where all are recorded or only some; more of
    them take longer."""
    policy = tight(dense_layers=(1,))
    (whole,) = replay(traces["one turn"], [policy])
    (part,) = replay(record(tiny.model, SAMPLE, layers=[2]), [policy])
    on_device = policy.swap(transfer=kvframe.KeepOnDevice())
    (kept,) = replay(traces["one turn"], [on_device])
    moved = [2 * figures.rows_recalled * 2 * 8 * 8 / SAMPLE.num_steps for figures in whole.layers]

    assert whole.bytes_per_token == pytest.approx(sum(moved) / 2)
    assert part.bytes_per_token == pytest.approx(moved[1])
    assert kept.bytes_per_token == 0 and kept.step_seconds < whole.step_seconds
    assert kept.captured_mass == whole.captured_mass


def test_units_are_built_once(traces: dict[str, Trace], monkeypatch: pytest.MonkeyPatch):
    """Variants that differ in nothing that units depend on share them; the figures do not."""
    built = []
    original = kvframe_louis.ClusterUnits.build

    def build(units: kvframe_louis.ClusterUnits, keys: torch.Tensor) -> kvframe.Units:
        built.append(keys.shape)
        return original(units, keys)

    monkeypatch.setattr(kvframe_louis.ClusterUnits, "build", build)
    trace = traces["one turn"]
    found = list(replay(trace, [tight(tau=0.2), tight(tau=0.9), tight(cluster_size=8), tight(tau=0.2)]))

    # The planner, which says what a step takes, clusters zeros of one channel.
    assert sum(width > 1 for *_, width in built) == 2 * len(trace.layers)
    assert found[0] == found[3] != found[1] and found[0].retrieval_rate < found[1].retrieval_rate


class TestFile:
    def test_round_trip(self, traces: dict[str, Trace], tmp_path: Path):
        """Everything comes back, and gives the same figures."""
        trace, path = traces["three turns"], tmp_path / "trace.safetensors"
        save_trace(trace, path)
        back = load_trace(path)

        assert [file.name for file in tmp_path.iterdir()] == ["trace.safetensors"]
        assert (back.turns, back.shape, back.fingerprint) == (trace.turns, trace.shape, trace.fingerprint)
        assert list(replay(path, [tight()])) == list(replay(trace, [tight()]))

    def test_what_is_no_trace(self, traces: dict[str, Trace], tmp_path: Path):
        """Missing, cut short, another safetensors file, another version, tensors that are gone."""
        from safetensors.torch import load_file, save_file

        path = tmp_path / "trace.safetensors"
        save_trace(traces["one turn"], path)
        whole, tensors = path.read_bytes(), load_file(path)
        (tmp_path / "short").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "text").write_text("hello")
        save_file(tensors, tmp_path / "other")
        with safe_open(path, framework="pt") as file:
            (key, text), *_ = file.metadata().items()
        save_file(tensors, tmp_path / "old", metadata={key: text.replace('"version": 1', '"version": 7')})
        save_file({"token_ids": tensors["token_ids"]}, tmp_path / "gone", metadata={key: text})
        save_file(
            {name: tensor[:, 1:].contiguous() if "keys" in name else tensor for name, tensor in tensors.items()},
            tmp_path / "odd",
            metadata={key: text},
        )
        for name, message in {
            "missing": "cannot read the trace .*missing",
            "short": "cannot read the trace .*expected a whole file that `kvframe trace` wrote",
            "text": "cannot read the trace",
            "other": "is no trace: it does not say what it holds",
            "old": "is a trace of version 7, this kvframe reads version 1",
            "gone": "cannot read the trace .*KeyError",
            "odd": "is broken: its layers do not hold 84 tokens",
        }.items():
            with pytest.raises(ConfigError, match=message):
                load_trace(tmp_path / name)

    def test_where_it_cannot_be_written(self, traces: dict[str, Trace], tmp_path: Path):
        """No file is left behind."""
        (tmp_path / "folder").mkdir()
        for path in (tmp_path / "no" / "trace", tmp_path / "folder"):
            with pytest.raises(ConfigError, match="cannot write the trace"):
                save_trace(traces["one turn"], path)
        assert [file.name for file in tmp_path.iterdir()] == ["folder"]


class TestOtherModels:
    def test_another_model(self, traces: dict[str, Trace], tiny: Tiny):
        """Other weights, another shape; the same weights in another dtype are the same model."""
        trace = traces["one turn"]
        other = copy.deepcopy(tiny.model)
        other.model.layers[1].self_attn.k_proj.weight.data[0, 0] += 1

        trace.check_model(copy.deepcopy(tiny.model).to(torch.bfloat16))
        for model in (other, make_model("Llama")):
            with pytest.raises(ConfigError, match="whose config or weights are not those of this LlamaForCausalLM"):
                trace.check_model(model)

    def test_policies_for_another_model(self, traces: dict[str, Trace]):
        """Layers and thresholds that this one has not."""
        with pytest.raises(ConfigError, match="dense_layers names layer 9, the trace is of .* layers 0 to 2"):
            list(replay(traces["one turn"], [tight(dense_layers=(9,))]))
        with pytest.raises(ConfigError, match="tau has 2 values, the model has 3 layers"):
            list(replay(traces["one turn"], [tight(tau=(0.1, 0.2))]))

    def test_layers(self, tiny: Tiny):
        """Those that were asked for, or a few evenly spaced."""
        assert choose_layers(range(30)) == (3, 11, 18, 26) and choose_layers((1, 3)) == (1, 3)
        assert choose_layers(range(4), [3, 1, 3]) == (1, 3)
        with pytest.raises(ConfigError, match="layer 7 keeps no full KV cache, or does not exist; those that do: 0, 1"):
            record(tiny.model, SAMPLE, layers=[7])

    def test_too_large(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
        """Known before anything runs."""
        monkeypatch.setattr(tiny.model.model, "forward", None)
        with pytest.raises(
            ConfigError, match="the trace of 3 layers over 84 tokens takes .* GiB, 0.00 GiB are allowed"
        ):
            record(tiny.model, SAMPLE, max_bytes=1000)

    def test_jobs_need_a_file(self, traces: dict[str, Trace]):
        """Each process reads it."""
        with pytest.raises(ConfigError, match="several jobs read the trace from a file each"):
            list(replay(traces["one turn"], [tight()], jobs=2))


@pytest.mark.model
def test_a_real_model(smollm2: Any):
    """SmolLM2 in float32: one layer of a trace as in a live run."""
    sample = task("niah_single", digits=4).make(smollm2.tokenizer, 700, 0, haystack())
    policy = kvframe.policy(
        "louiskv",
        token_budget=64,
        sink_size=8,
        window_size=32,
        tau=0.8,
        dense_layers=tuple(i for i in range(30) if i != 9),
    )
    (found,) = replay(record(smollm2.model, sample, layers=[9]), [policy])

    assert_as_live(found, smollm2.model, policy, sample, 1e-5)
    assert 0.1 < found.captured_mass < found.oracle_mass < 1
