"""What full attention gives every token of a trace in every decode step: the measure of what policies attend to."""

import torch
from attrs import frozen
from torch import Tensor

from kvframe.eval.trace import LayerTrace, Trace
from kvframe_kernels.slot_attention import slot_attention_reference


@frozen(kw_only=True, eq=False)
class Oracle:
    """One layer over the S decode steps of a trace of N tokens; the same for every policy."""

    weights: Tensor
    """[S, H, N] in at least float32: share of the softmax, meaned over the query heads of a group, by position."""
    ranks: Tensor
    """int64 [S, H, N]: place of each position when they are ordered by weight, the heaviest first."""
    captured: Tensor
    """[S, H, N]: what the heaviest 1, 2, ... tokens hold together."""
    out: Tensor
    """[S, Hq, Dv], what full attention gives."""


def make_oracle(trace: Trace, layer: LayerTrace) -> Oracle:
    """Full attention of every decode step of a layer."""
    num_kv_heads, num_tokens, head_dim = layer.keys.shape
    steps = [start for start, _, is_prompt in trace.calls() if not is_prompt]
    dtype = torch.promote_types(layer.query.dtype, torch.float32)
    weights = torch.zeros(len(steps), num_kv_heads, num_tokens, dtype=dtype)
    outputs = []
    for place, step in enumerate(steps):
        query, length = layer.query[None, :, step : step + 1], step + 1
        keys, values = layer.keys[None, :, :length], layer.values[None, :, :length]
        grouped = (query * layer.sm_scale).reshape(num_kv_heads, -1, head_dim)
        scores = torch.matmul(grouped, keys[0].transpose(1, 2)).to(dtype)
        weights[place, :, :length] = scores.softmax(-1).mean(1)
        outputs.append(slot_attention_reference(query, keys, values, None, layer.sm_scale)[0][0, :, 0])
    # Tokens that are not there yet weigh nothing, and come last.
    order = weights.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(num_tokens).expand_as(order))
    return Oracle(weights=weights, ranks=ranks, captured=weights.gather(-1, order).cumsum(-1), out=torch.stack(outputs))
