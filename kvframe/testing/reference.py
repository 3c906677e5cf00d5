"""Attention as its definition has it: in float64, over the positions that are given."""

import torch
from torch import Tensor

from kvframe.testing.cases import Case, Heads, Text
from kvframe.types import LayerLayout


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, sm_scale: float) -> Tensor:
    """Softmax attention in float64: query [..., D], keys [..., n, D], values [..., n, Dv], visible bool [..., n]."""
    # What is not visible may be NaN, as padding is.
    keys, values = (part.double().masked_fill(~visible[..., None], 0) for part in (keys, values))
    products = (keys @ query.double()[..., None])[..., 0] * sm_scale
    weights = products.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights[..., None, :] @ values)[..., 0, :]


def attention_over(text: Text, case: Case, layout: LayerLayout, column: int, positions: Heads) -> Tensor:
    """Output [B, Hq, 1, Dv] of the query in a column, every KV head attending to its own positions."""
    visible = torch.zeros(text.keys.shape[:3], dtype=torch.bool)
    for batch, rows in enumerate(positions):
        for head, own in enumerate(rows):
            visible[batch, head, torch.tensor(own) + case.padding[batch]] = True
    return attention_where(text, layout, column, visible)


def attention_where(text: Text, layout: LayerLayout, column: int, visible: Tensor) -> Tensor:
    """The same over the columns of a mask [B, H, T]."""
    keys, values, visible = (
        part.repeat_interleave(layout.group_size, dim=1) for part in (text.keys, text.values, visible)
    )
    return plain_attention(text.query[:, :, column], keys, values, visible, layout.sm_scale)[:, :, None]


def causal_attention_over(text: Text, case: Case, layout: LayerLayout) -> Tensor:
    """Output [B, Hq, T, Dv] of full attention, causal, zero at padding."""
    columns = torch.arange(text.keys.shape[2])
    real = columns >= torch.tensor(case.padding)[:, None, None]
    outputs = []
    for column in columns.tolist():
        visible = (real & (columns <= column)).expand(text.keys.shape[:3])
        # A query at padding sees nothing, which is 0/0.
        outputs.append(attention_where(text, layout, column, visible).nan_to_num(0.0))
    return torch.cat(outputs, 2)
