"""Turning post-RoPE queries by some positions, with the model's own rotary embedding."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Their frequencies depend on the length of the text.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def relative_rotation(decoder: Any) -> Callable[[Tensor, int], Tensor] | None:
    """A function that turns queries [B, Hq, D] by a number of positions; None where it is not known to be right.

    The model's `apply_rotary_pos_emb` and `rotary_emb` are used, and the result is checked against them.
    """
    apply = getattr(sys.modules[type(decoder).__module__], "apply_rotary_pos_emb", None)
    rotary = getattr(decoder, "rotary_emb", None)
    if apply is None or rotary is None or getattr(rotary, "rope_type", "default") in _LENGTH_DEPENDENT:
        return None
    scaling = getattr(rotary, "attention_scaling", 1.0)

    def place(query: Tensor, position: int) -> Tensor:
        positions = torch.full((1, 1), position, device=query.device)
        cos, sin = rotary(query, positions)
        states = query[:, :, None]
        turned: Tensor = apply(states, states, cos / scaling, sin / scaling)[0]
        return turned[:, :, 0]

    try:
        return place if _adds_up(place, decoder) else None
    except Exception:
        return None


def _adds_up(place: Callable[[Tensor, int], Tensor], decoder: Any) -> bool:
    config = decoder.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device = next(decoder.parameters()).device
    query = torch.linspace(-1.0, 1.0, 2 * head_dim, device=device).view(1, 2, head_dim)
    there = place(place(query, 7), 1)
    return torch.allclose(there, place(query, 8), atol=1e-5) and not torch.allclose(there, query, atol=1e-3)
