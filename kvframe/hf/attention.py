"""The attention and mask functions that transformers calls under the name "kvframe".

Layers and caches that are not ours go to the implementation that the model ran before.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvframe.errors import UnsupportedCallError, UnsupportedModelError
from kvframe.hf.cache import RetrievalCacheLayer

# A neutral name: transformers reads meaning into names that contain "flash", "sdpa", "flex_attention" or a slash.
ATTENTION_NAME = "kvframe"

# What a config's model ran before it was attached, by the config's identity; configs cannot be hashed.
_previous: dict[int, str] = {}

# Arguments of attention functions that change the result and that ours does not know.
_UNSERVED = ("softcap", "s_aux", "position_bias", "sinks")


def remember_previous(config: Any, implementation: str) -> None:
    """Delegate to this implementation for models of this config."""
    _previous[id(config)] = implementation


def forget_previous(config: Any) -> None:
    """The model is its own again."""
    _previous.pop(id(config), None)


def kvframe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer.

    query: [B, Hq, T, D], after RoPE; key, value: [B, H, T, D], as `Cache.update` returned them.
    Returns ([B, T, Hq, Dv], None). Raises UnsupportedModelError for arguments that would change the result.
    """
    layer = getattr(key, "_kvframe_layer", None)
    if not isinstance(layer, RetrievalCacheLayer):
        return _delegate(module, query, key, value, attention_mask, scaling, **kwargs)
    for name in _UNSERVED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"layer {layer.layer_idx}: the model passes {name}, which the attention does not serve"
            )
    if kwargs.get("output_attentions"):
        raise UnsupportedCallError("output_attentions: there is no full row of attention weights under retrieval")
    sm_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = layer.attend(query, key, value, attention_mask, sm_scale)
    return out.transpose(1, 2).contiguous(), None


def kvframe_mask(**kwargs: Any) -> Any:
    """The mask for one forward pass: the 2D padding mask for prompts, none for decoding; anything special is delegated."""
    config = kwargs.get("config")
    plain = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    if not plain or kwargs.get("local_size") is not None:
        build = ALL_MASK_ATTENTION_FUNCTIONS.get(_implementation_for(config))
        return None if build is None else build(**kwargs)
    return kwargs.get("attention_mask") if kwargs["q_length"] > 1 else None


def _implementation_for(config: Any) -> str:
    return _previous.get(id(config), "sdpa")


def _delegate(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    implementation = _implementation_for(getattr(module, "config", None))
    attend = _attention_function(module, implementation)
    if attention_mask is None or attention_mask.dim() == 2:
        attention_mask = _explicit_mask(module, implementation, query, key, attention_mask)
    result: tuple[Tensor, Tensor | None] = attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return result


def _attention_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if implementation == "eager":
        if own is None:
            raise UnsupportedModelError(f"{type(module).__name__} has no eager attention to fall back to")
        return own  # type: ignore[no-any-return]
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own)  # type: ignore[no-any-return]


def _explicit_mask(
    module: nn.Module, implementation: str, query: Tensor, key: Tensor, padding: Tensor | None
) -> Tensor | None:
    """What the other implementation expects where our mask function gave the 2D mask or nothing."""
    if "flash" in implementation or not getattr(module, "is_causal", True):
        return padding
    num_queries, num_keys = query.shape[2], key.shape[2]
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
    if padding is not None:
        visible = visible & padding[:, None, None, -num_keys:].bool()
    elif num_queries in (1, num_keys) and implementation == "sdpa":
        return None  # plain causal, which it sees by itself
    visible = visible.expand(query.shape[0], 1, num_queries, num_keys)
    if implementation != "eager":
        return visible
    return torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)


def register() -> None:
    """Make the name known to transformers; nothing else changes."""
    AttentionInterface.register(ATTENTION_NAME, kvframe_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, kvframe_mask)
