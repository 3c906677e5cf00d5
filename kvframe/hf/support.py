"""Which models a retrieval cache serves; everything else is refused before anything is changed."""

from inspect import signature
from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from kvframe.errors import ConfigError, UnsupportedModelError

# A neutral name: transformers reads meaning into names that contain "flash", "sdpa", "flex_attention" or a slash.
ATTENTION_NAME = "kvframe"


def decoder_config(model: PreTrainedModel) -> Any:
    """The config of the text decoder."""
    return model.config.get_text_config(decoder=True)


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The text decoder, without its head."""
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    # ModernBERT calls its output projection "decoder", and that is what comes.
    base: Any = model.base_model
    return decoder if isinstance(decoder, PreTrainedModel) else base


def stock_layers(config: Any) -> list[Any]:
    """The cache layers transformers itself would use, one a model layer."""
    return list(DynamicCache(config=config).layers)


def kv_shape(config: Any) -> tuple[int, int]:
    """KV heads and head_dim of a layer, as far as the config tells; never more than they are.

    Only keys and values tell exactly.
    """
    try:
        num_heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        return int(getattr(config, "num_key_value_heads", None) or 1), int(head_dim)
    except Exception:
        return 1, 1


def is_retrieval_layer(layer: object) -> bool:
    """Whether a stock layer keeps a full, growing KV cache, which a policy can manage."""
    return type(layer) is DynamicLayer


def check_model(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError, with the reason, for a model whose attention a retrieval cache cannot reproduce.

    Raises ConfigError for what is no model of transformers at all.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"expected a PreTrainedModel of transformers, got {type(model).__name__}; load one with "
            "AutoModelForCausalLM.from_pretrained, or pass the model inside the wrapper"
        )
    reason = _reason_against(model)
    if reason is not None:
        raise UnsupportedModelError(f"{type(model).__name__} is not supported: {reason}")


def _reason_against(model: PreTrainedModel) -> str | None:
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder; expected a decoder-only language model"
    config = decoder_config(model)
    return (
        _config_reason(config)
        or _interface_reason(model)
        or _layer_reason(config)
        or _module_reason(model, stock_layers(config))
        or _cache_reason(type(model))
    )


def _config_reason(config: Any) -> str | None:
    if getattr(config, "kv_lora_rank", None):
        return (
            "it uses multi-head latent attention (MLA), whose cache holds latents and not keys and values; a policy "
            "over latents is not available yet"
        )
    for name in ("attn_logit_softcapping", "attn_logit_softcap"):
        if getattr(config, name, None):
            return f"it caps attention logits ({name}={getattr(config, name)}), which the decode attention does not do"
    if getattr(config, "num_kv_shared_layers", 0) or any(getattr(config, "kv_sharing_modes", None) or ()):
        return "layers share each other's keys and values, so that no layer owns what a policy would move"
    if not getattr(config, "is_causal", True):
        return "its attention is bidirectional; expected a causal language model"
    if getattr(config, "alibi", False) or getattr(config, "position_bias", False):
        return "it adds a position bias to attention logits, which the decode attention does not do"
    return None


def _interface_reason(model: PreTrainedModel) -> str | None:
    if not model._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    return None


def _module_reason(model: PreTrainedModel, layers: list[Any]) -> str | None:
    for name, module in model.named_modules():
        layer_idx = getattr(module, "layer_idx", None)
        if isinstance(layer_idx, int) and layer_idx < len(layers) and not is_retrieval_layer(layers[layer_idx]):
            continue  # a layer that keeps its stock cache also keeps its stock attention
        if "attn" in name.rsplit(".", 1)[-1] or "attention" in type(module).__name__.lower():
            if getattr(module, "sinks", None) is not None:
                return f"its attention has learned sinks ({name}.sinks), which the decode attention does not do"
            if hasattr(module, "prepare_dynamic_mask"):
                return f"its attention makes a mask of its own ({name}), which the decode attention does not know"
    return None


def _layer_reason(config: Any) -> str | None:
    try:
        layers = stock_layers(config)
    except Exception as error:
        return f"transformers builds no dynamic cache for its config ({type(error).__name__}: {error})"
    if not layers:
        return (
            "transformers builds its cache without a layer plan, so it cannot be told which layers keep a full KV cache"
        )
    for layer in layers:
        if is_retrieval_layer(layer) or type(layer) is DynamicSlidingWindowLayer:
            continue
        if isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin):
            continue
        if not isinstance(layer, CacheLayerMixin | LinearAttentionCacheLayerMixin):
            continue  # a placeholder of a layer without attention
        return f"it has cache layers of type {type(layer).__name__}, which mix a full KV cache with something else"
    if not any(is_retrieval_layer(layer) for layer in layers):
        return "no layer keeps a full KV cache (all are sliding or recurrent), so there is nothing to retrieve"
    return None


def _cache_reason(model_cls: Any) -> str | None:
    # A model without a head does not generate, and does not say.
    takes_others = getattr(model_cls, "_supports_default_dynamic_cache", lambda: True)
    if takes_others() and "past_key_values" in signature(model_cls.forward).parameters:
        return None
    return "it keeps a cache of its own making; expected one that takes any Cache as past_key_values"
