"""The attention and mask functions that transformers calls under the name "kvframe".

What does not come from a RetrievalCache goes, unchanged, to the implementation that the model ran before.
"""

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvframe.errors import UnsupportedCallError, UnsupportedModelError
from kvframe.hf.cache_layer import KEYS_CHANGED, NewKeysOffset, RetrievalCacheLayer
from kvframe.hf.support import ATTENTION_NAME

# What serves a model that was loaded under our name, and so never ran another implementation.
_DEFAULT = "sdpa"

# For the config of every attached model, by its identity (configs cannot be hashed): a copy that names the
# implementation from before.
_before: dict[int, Any] = {}

# Arguments of attention functions that change the result and that ours does not know.
_UNSERVED = ("softcap", "s_aux", "position_bias", "sinks")


def remember(config: Any) -> None:
    """Until `forget`, models of this config delegate to the implementation that it names now."""
    before = copy.copy(config)
    if before._attn_implementation == ATTENTION_NAME:
        before._attn_implementation_internal = _DEFAULT
    _before[id(config)] = before


def forget(config: Any) -> None:
    """Models of this config are their own again."""
    _before.pop(id(config), None)


def is_remembered(config: Any) -> bool:
    """Whether a model of this very config is attached."""
    return id(config) in _before


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
    Returns ([B, T, Hq, Dv], None). Raises UnsupportedModelError or UnsupportedCallError for whatever would change the
    result and is not served.
    """
    if torch.compiler.is_compiling():
        # Traced by `compiled_step` alone: whatever else compiles an attached model has its own implementation.
        sm_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.kvframe.attend(query, key, value, module.layer_idx, sm_scale), None
    layer = getattr(key, "_kvframe_layer", None)
    if not isinstance(layer, RetrievalCacheLayer):
        return _delegate(module, query, key, value, attention_mask, scaling, kwargs)
    try:
        _refuse_unserved(layer, module, kwargs)
        sm_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = layer.attend(module, query, key, value, attention_mask, sm_scale)
    except BaseException:
        layer.cache.abandon()
        raise
    return out.transpose(1, 2).contiguous(), None


def _refuse_unserved(layer: RetrievalCacheLayer, module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name in _UNSERVED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"layer {layer.layer_idx}: the model passes {name}, which retrieval attention does not serve"
            )
    if kwargs.get("sliding_window") is not None:
        raise UnsupportedModelError(
            f"layer {layer.layer_idx}: the model attends to a window of {kwargs['sliding_window']} tokens there, but "
            "its config plans a full cache; expected full attention"
        )
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise UnsupportedModelError(f"layer {layer.layer_idx}: attention is bidirectional; expected causal attention")
    # Configs answer slowly, so only the first layer asks.
    config = getattr(module, "config", None) if layer.place == 0 else None
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise UnsupportedCallError(
            "output_attentions: there is no full row of attention weights under retrieval; leave it out, or detach the "
            "model"
        )
    if kwargs.get("dropout"):
        raise UnsupportedCallError(
            f"layer {layer.layer_idx}: attention dropout of {kwargs['dropout']} came; expected none; call model.eval()"
        )


def kvframe_mask(**kwargs: Any) -> Any:
    """The mask for one forward pass: the 2D padding mask over a RetrievalCache; anything else is delegated.

    Raises UnsupportedCallError where attention over a RetrievalCache would not be causal.
    """
    if not isinstance(kwargs.get("kv_offset"), NewKeysOffset):
        return _delegate_mask(kwargs)
    if kwargs.get("local_size") is not None:
        # Models that may have sliding layers ask for their mask also where the cache has none. A layer that took this
        # one would be refused.
        return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=kwargs.get("device"))
    if kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise UnsupportedCallError(
            "attention over this input is not plainly causal (image or prefix tokens that see each other, for "
            "instance); expected text, with left padding or none"
        )
    return kwargs.get("attention_mask")


def _delegate_mask(kwargs: dict[str, Any]) -> Any:
    before = _before.get(id(kwargs.get("config")))
    if before is None:
        return ALL_MASK_ATTENTION_FUNCTIONS[_DEFAULT](**kwargs)
    build = ALL_MASK_ATTENTION_FUNCTIONS.get(before._attn_implementation)
    # As in transformers, an implementation without a mask function gets no mask.
    return None if build is None else build(**kwargs | {"config": before})


class _AsBefore:
    """An attention module of an attached model, with the config from before: some implementations read their name."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self._module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _delegate(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    before = _before.get(id(getattr(module, "config", None)))
    if before is None:
        for name in _UNSERVED:
            if kwargs.get(name) is not None:
                raise UnsupportedModelError(
                    f"{type(module).__name__} passes {name}, which {_DEFAULT} attention would drop; load the model "
                    f"with its own attention implementation instead of {ATTENTION_NAME!r}"
                )
    implementation = _DEFAULT if before is None else before._attn_implementation
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and "flash" not in implementation:
        # The mask was made for a RetrievalCache, but the keys are none that it handed on.
        raise UnsupportedModelError(f"layer {getattr(module, 'layer_idx', type(module).__name__)}: {KEYS_CHANGED}")
    own: Any = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own)
    if attend is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager attention to fall back to")
    shown = module if before is None else _AsBefore(module, before)
    result: tuple[Tensor, Tensor | None] = attend(shown, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return result


def register() -> None:
    """Make the name known to transformers; nothing else changes."""
    AttentionInterface.register(ATTENTION_NAME, kvframe_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, kvframe_mask)
