"""A trace replayed against a live run in `shadow` execution over the same text."""

from typing import Any

import pytest
from eval.conftest import Tiny
from eval.test_forced import SAMPLE, TURNS
from helpers import policy_records, record_id, small_options

import kvframe
from kvframe.eval import Sample, run_forced
from kvframe.eval.replay import Replayed, replay
from kvframe.eval.trace import Trace, record
from kvframe.registry import PolicyRecord

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


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    """Every layer of the tiny model over both samples."""
    from eval.conftest import make_tiny

    return {name: record(make_tiny().model, sample, layers=range(3)) for name, sample in SAMPLES.items()}


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("policy_record", policy_records(), ids=record_id)
def test_every_policy_as_in_a_live_run(policy_record: PolicyRecord, text: str, tiny: Tiny, traces: dict[str, Trace]):
    """In float64 the figures are the same; in a model whose layers are dense there are none."""
    policy = policy_record.make(**small_options(policy_record.config_cls))
    (found,) = replay(traces[text], [policy])
    if policy.dense_layers == "all":
        assert found.layers == () and found.captured_mass is None and found.bytes_per_token == 0
    else:
        assert len(found.layers) == 3 - len(policy.dense_layers)
        assert_as_live(found, tiny.model, policy, SAMPLES[text], 1e-9)
