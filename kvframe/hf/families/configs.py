"""Tiny random models of the causal-LM families that transformers can build."""

import contextlib
import dataclasses
import itertools
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kvframe.hf.families.overrides import OVERRIDES
from kvframe.hf.families.sizes import NUM_LAYERS, PATTERN_LAYERS, tiny_value

_WITHOUT_FULL_ATTENTION = frozenset({"sliding_attention", "chunked_attention", "linear_attention", "conv"})


def model_types() -> list[str]:
    """Every model type that transformers maps to a causal LM."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build_config(model_type: str) -> PreTrainedConfig:
    """The tiny configuration of a model type."""
    return _shrink(CONFIG_MAPPING[model_type])


def build_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of a type, in float32 and eval mode, whose logits depend on what its layers attend to."""
    torch.manual_seed(seed)
    auto_class: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto_class.from_config(build_config(model_type), dtype=torch.float32).eval()
    _randomise(model)
    return model


def _shrink(config_class: type[PreTrainedConfig], given: dict[str, Any] | None = None) -> PreTrainedConfig:
    override = OVERRIDES.get(config_class.model_type, {})
    defaults = _defaults(config_class)
    placeholders = itertools.count(3)
    tiny: dict[str, Any] = {}
    for name, value in defaults.items():
        if isinstance(value, PreTrainedConfig):
            tiny[name] = _shrink(type(value), override.get(name))
        elif _counts(value):
            small = tiny_value(name)
            if small is None and name.endswith(("_token_id", "_token_index")):
                small = next(placeholders)
            if small is not None:
                tiny[name] = small
    tiny |= _attention_shape(defaults)
    tiny |= _layer_pattern(defaults)
    tiny |= {name: value for name, value in override.items() if not isinstance(tiny.get(name), PreTrainedConfig)}
    return config_class(**tiny | (given or {}))


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    fields = dataclasses.fields(config_class)
    defaults = {field.name: None if field.default is dataclasses.MISSING else field.default for field in fields}
    with contextlib.suppress(ValueError):  # a few classes refuse their own defaults: then the declared ones have to do
        config = config_class()
        for name in defaults:
            with contextlib.suppress(Exception):  # a size that differs from layer to layer has no single value
                defaults[name] = getattr(config, name)
    return defaults


def _counts(value: object) -> bool:
    """Is it a whole number, or a list of them? Zero means that the family goes without, and stays."""
    values = value if isinstance(value, list) and value else [value]
    return all(isinstance(one, int) and not isinstance(one, bool) and one != 0 for one in values)


def _attention_shape(defaults: dict[str, Any]) -> dict[str, Any]:
    """What the name of a field does not tell by itself."""
    shape: dict[str, Any] = {}
    if "kv_lora_rank" in defaults:  # latent attention: each head has keys of its own, and only a part of them rotates
        shape |= {"num_key_value_heads": tiny_value("num_attention_heads"), "head_dim": tiny_value("qk_rope_head_dim")}
    else:
        shape |= {
            name: tiny_value(name) for name in ("head_dim", "num_key_value_heads") if defaults.get(name, 0) is None
        }
    # encoders serve as decoders too, and decoders of a pair alone; a forced last token would hide the logits
    shape |= {"is_decoder": True, "forced_eos_token_id": None}
    return {name: value for name, value in shape.items() if name in defaults}


def _layer_pattern(defaults: dict[str, Any]) -> dict[str, Any]:
    """Layers of every kind that the family has, and some that attend to everything."""
    patterns: dict[str, list[str]] = {}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if kinds := list(dict.fromkeys(defaults.get(name) or ())):
            if name != "mlp_layer_types" and _WITHOUT_FULL_ATTENTION.issuperset(kinds):
                kinds.append("full_attention")
            patterns[name] = kinds
    if not patterns:
        return {}
    num_layers = NUM_LAYERS if max(map(len, patterns.values())) == 1 else PATTERN_LAYERS
    result: dict[str, Any] = {name: (kinds * num_layers)[:num_layers] for name, kinds in patterns.items()}
    return result | {name: num_layers for name in ("num_hidden_layers", "num_layers") if name in defaults}


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Give every matrix a spread of about one over its inputs, and every vector a little noise.

    The stock initialisation (spread 0.02) makes attention uniform and logits vanish: then every context looks the same,
    and a comparison proves nothing.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.ndim >= 2:
            parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
