"""KV footprints against sums over single steps."""

import pytest
from eval.conftest import Tiny
from eval.test_forced import SAMPLE
from hf.tiny import tight

import kvframe
from kvframe.errors import ConfigError
from kvframe.eval import critical_footprint, run_forced
from kvframe.eval.footprint import Footprint, footprint
from kvframe.eval.forced import ForcedRun

PROMPT, STEPS = 59, 25  # the prompt's last token is decoded
HEADS, LAYERS = 2, 3


def both(run: ForcedRun) -> tuple[Footprint, Footprint]:
    """Of the whole run, and of its decode steps."""
    whole, decode = (footprint(run, PROMPT, STEPS, decode_only=flag) for flag in (False, True))
    return whole, decode


def test_full_attention_is_the_measure(tiny: Tiny):
    """Everything is stored and attended to, and on the device but for the row that nobody uses."""
    for found in both(run_forced(tiny.model, kvframe.policy("full"), SAMPLE)):
        assert found.stored == found.attended == 1
        assert 1 <= found.peak_on_device <= found.on_device <= 1.05


def test_window(tiny: Tiny):
    """Sums over steps, with what each layer allocates counted from the first token on."""
    policy = kvframe.policy("window", sink_size=4, window_size=8, dense_layers=(0,))
    run = run_forced(tiny.model, policy, SAMPLE)
    whole, decode = both(run)
    tokens = PROMPT + STEPS
    entry = HEADS * 2 * 8 * 8  # K and V of 8 numbers in float64
    full = allocated = read = flying = 0.0
    full_decode = allocated_decode = read_decode = 0.0
    for layer in run.cache.managed_layers:
        runtime = layer.runtime
        assert runtime is not None
        own = runtime.index_bytes() / entry
        own += 1 if layer.layer_idx == 0 else runtime.device_bytes() / entry  # the dense layer has room for one more
        for step in range(1, tokens + 1):
            held = own + (step if layer.layer_idx == 0 else 0)
            seen = step if layer.layer_idx == 0 or step <= PROMPT else 4 + 8
            full, allocated, read = full + step, allocated + held, read + seen
            if layer.layer_idx and step <= PROMPT:
                flying += step / LAYERS
            if step > PROMPT:
                full_decode, allocated_decode = full_decode + step, allocated_decode + held
                read_decode += seen

    assert whole.stored == decode.stored == 1  # what left the window is on the host
    assert whole.on_device == pytest.approx((allocated + flying) / full)
    assert decode.on_device == pytest.approx(allocated_decode / full_decode)
    assert whole.attended == pytest.approx(read / full) and decode.attended == pytest.approx(read_decode / full_decode)
    assert decode.on_device < whole.on_device + 0.2 and decode.peak_on_device < whole.peak_on_device


def test_more_retrieved_is_more(tiny: Tiny):
    """Attended and held entries grow with the budget."""
    policies = (tight().swap(selector=kvframe.TopBudget(token_budget=budget)) for budget in (8, 24))
    small, large = (both(run_forced(tiny.model, policy, SAMPLE))[1] for policy in policies)

    assert small.attended < large.attended < 1 and small.on_device < large.on_device


def test_where_the_curve_crosses():
    """Linear between points; a sign where it does not cross."""
    points = [(0.4, 0.95), (0.1, 0.5), (0.2, 0.8)]

    found = critical_footprint(points, full_score=1.0)
    assert found.value == pytest.approx(0.2 + 0.2 * (0.9 - 0.8) / 0.15) and str(found) == "33.3%"
    assert str(critical_footprint(points, full_score=0.5)) == "<10.0%"
    assert str(critical_footprint(points, full_score=2.0)) == ">40.0%"
    with pytest.raises(ConfigError, match="needs at least one point"):
        critical_footprint([], 1.0)
