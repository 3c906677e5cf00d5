"""StreamingLLM (arXiv 2309.17453) by its definition: the first tokens and the last ones."""

import pytest
from baselines.plain import steps_of

import kvframe


@pytest.mark.parametrize("sink_size, window_size", [(4, 8), (0, 5), (3, 1), (20, 60)])
def test_sinks_and_window_alone(sink_size: int, window_size: int):
    """Every step attends to the first `sink_size` positions and the last `window_size`, its own token among them."""
    for step in steps_of(kvframe.policy("streamingllm", sink_size=sink_size, window_size=window_size)):
        length = len(step.keys)
        sinks, window = range(min(sink_size, length)), range(max(0, length - window_size), length)
        assert step.attended == sorted({*sinks, *window})


def test_published_defaults():
    """4 sinks, and 1020 recent tokens: a cache of 1024, in every layer."""
    policy = kvframe.policy("streamingllm")

    assert (policy.sink_size, policy.window_size, policy.dense_layers) == (4, 1020, ())
    assert policy.transfer.drops
