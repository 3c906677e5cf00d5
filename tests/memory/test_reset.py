"""A layer after a sequence that was not finite."""

import math

import torch
from torch import Tensor

import kvframe
from kvframe.runtime import RetrievalLayer


def test_nothing_that_was_not_finite_stays() -> None:
    """Attention reads what empty slots and entries hold, and so must not find what an earlier sequence left there."""
    policy = kvframe.policy("louiskv-plus", token_budget=8, sink_size=2, window_size=4, cluster_size=2, dense_layers=())
    layout = kvframe.LayerLayout(
        layer_idx=0, num_layers=1, batch_size=2, num_qo_heads=4, num_kv_heads=2, head_dim=16, value_dim=16,
        dtype=torch.float64, device=torch.device("cpu"), sm_scale=0.25,
    )  # fmt: skip
    layer = RetrievalLayer(layout, policy, 64, "offload")

    def run(*num_tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)

        def states(count: int) -> list[Tensor]:
            shapes = ((2, heads, count, 16) for heads in (4, 2, 2))
            return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

        layer.prompt(*states(max(num_tokens)), list(num_tokens), max(num_tokens))
        return torch.cat([layer.decode(*states(1)) for _ in range(3)], 2)

    expected = run(20, 9)  # with empty slots, and with fewer units in one than in the other
    layer.memory.slots.values.fill_(math.nan)
    for tensor in layer.catalog.index.tensors.values():
        tensor.fill_(math.nan)
    layer.reset()

    assert torch.equal(run(20, 9), expected)
