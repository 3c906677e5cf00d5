"""louiskv-plus: its parts, and its share of device memory."""

import pytest
import torch

import kvframe
from kvframe.errors import ConfigError
from kvframe.runtime import RetrievalLayer
from kvframe.testing.cases import make_layout, make_text

CONTEXT, NEW_TOKENS = 8192, 256


def test_share_of_device_memory():
    """With its defaults, what it keeps on the device for finding and estimating KV takes at most a fifth of the KV that
    it stands for, in 16 bits and at the width that models have."""
    policy = kvframe.policy("louiskv-plus", num_iterations=1)
    layout = make_layout(batch_size=1, num_kv_heads=1, group_size=1, head_dim=128, dtype=torch.bfloat16)
    layer = RetrievalLayer(layout, policy, CONTEXT + NEW_TOKENS, "offload")
    text = make_text(layout, CONTEXT + 1, 0)
    query, keys, values = text.span(0, CONTEXT)
    layer.prompt(query, keys, values, [CONTEXT], CONTEXT)
    layer.decode(*text.span(CONTEXT, CONTEXT + 1))

    assert layer.index_bytes() <= 0.2 * (CONTEXT + NEW_TOKENS) * layout.row_bytes


def test_parts_can_be_left_out():
    """What is left is LouisKV's: its trigger, its selection, and nothing that is estimated."""
    louiskv = kvframe.policy("louiskv")
    whole = kvframe.policy("louiskv-plus")
    bare = kvframe.policy("louiskv-plus", missed_share=None, bits=None, estimate=False)

    assert whole.trigger == kvframe.MissedShare(share=0.03, events=louiskv.trigger)
    assert isinstance(whole.selector, kvframe.EstimateRest)
    assert kvframe.policy("louiskv-plus", estimate=False).selector == whole.selector.selector
    assert (bare.trigger, bare.units, bare.selector) == (louiskv.trigger, louiskv.units, louiskv.selector)


def test_a_sketch_is_needed_to_miss_something():
    """Without one no token has a share of its own; the error says so when the policy is made."""
    with pytest.raises(ConfigError, match="does not weigh tokens"):
        kvframe.policy("louiskv-plus", bits=None)
