"""What a step of a layer launches: kernels, and next to nothing of plain torch."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvframe
from kvframe.runtime import RetrievalLayer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# What launches nothing: other views of the same memory, and memory whose contents nobody has set.
_NOTHING = {"alias", "as_strided", "detach", "expand", "permute", "reshape", "select", "slice", "split", "squeeze"}
_NOTHING |= {"t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"}
_NOTHING |= {"empty", "empty_like", "empty_strided", "new_empty", "promote_types", "is_pinned"}


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in _NOTHING:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def torch_operations(name: str) -> Counter[str]:
    """Of a step of a layer under a policy, once everything is allocated and compiled."""
    policy = kvframe.policy(name, token_budget=32, sink_size=4, window_size=16, cluster_size=4, dense_layers=())
    layout = kvframe.LayerLayout(
        layer_idx=0, num_layers=1, batch_size=2, num_qo_heads=8, num_kv_heads=2, head_dim=64, value_dim=64,
        dtype=torch.bfloat16, device=torch.device("cuda"), sm_scale=0.125,
    )  # fmt: skip
    layer = RetrievalLayer(layout, policy, 400, "offload")

    def states(num_tokens: int) -> list[torch.Tensor]:
        return [torch.randn(2, heads, num_tokens, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2)]

    layer.prompt(*states(300), [300, 300], 300)
    for _ in range(3):
        layer.decode(*states(1))
    given = states(1)
    layer.prepare_decode(1)
    with _Counting() as counting:
        layer.step(*given)
    return counting.counts


def test_louiskv_launches_kernels_alone() -> None:
    """One addition of plain torch, for the statistics."""
    assert torch_operations("louiskv").total() <= 1


def test_louiskv_plus_adds_kernels_alone() -> None:
    """What estimates and key sketches add to a step of LouisKV is no operation of plain torch."""
    assert torch_operations("louiskv-plus") == torch_operations("louiskv")
