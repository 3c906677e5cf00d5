"""A model's shape for the planner, from its config alone: nothing is loaded and no weight is made."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from kvframe.errors import ConfigError
from kvframe.hf.support import check_model, is_retrieval_layer, kv_shape, stock_layers
from kvframe.planner.shape import ModelShape


def model_shape(config: PreTrainedConfig, dtype: torch.dtype) -> ModelShape:
    """The shape of the causal language model that `config` describes, with weights and KV in `dtype`.

    The model is built on the meta device, where tensors have a shape and no memory.

    Raises ConfigError for a config of no causal language model, UnsupportedModelError for one that cannot be served.
    """
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except Exception as error:
        # What a config that does not fit raises is up to each model.
        raise ConfigError(
            f"cannot build a causal language model from a {type(config).__name__}: {type(error).__name__}: {error}"
        ) from error
    check_model(model)
    text = config.get_text_config(decoder=True)
    retrieval_layers = tuple(
        layer_idx for layer_idx, layer in enumerate(stock_layers(text)) if is_retrieval_layer(layer)
    )
    num_kv_heads, head_dim, value_dim = _kv_shape(model, text)
    return ModelShape(
        num_layers=len(stock_layers(text)),
        retrieval_layers=retrieval_layers,
        hidden_size=int(text.hidden_size),
        intermediate_size=int(getattr(text, "intermediate_size", None) or 0),
        num_qo_heads=int(text.num_attention_heads),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        vocab_size=int(text.vocab_size),
        dtype=dtype,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _kv_shape(model: Any, text: Any) -> tuple[int, int, int]:
    """KV heads and the widths of keys and values in the largest of the layers with a full KV cache.

    Only keys and values tell exactly, so one token goes through the model on the meta device. Where that fails, the
    config is asked, which may name fewer heads than there are.
    """
    try:
        with torch.inference_mode():
            token = torch.zeros(1, 1, dtype=torch.int64, device="meta")
            layers = model.eval()(input_ids=token, use_cache=True).past_key_values.layers
        shapes = [
            (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
            for layer in layers
            if is_retrieval_layer(layer)
        ]
    except Exception:
        # Any model's code may look at values, which are not there.
        num_heads, head_dim = kv_shape(text)
        return num_heads, head_dim, head_dim
    return max(shapes, key=lambda shape: shape[0] * (shape[1] + shape[2]))
