"""louiskv-plus: its share of device memory."""

import torch

import kvframe
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
