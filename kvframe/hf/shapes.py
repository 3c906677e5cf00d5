"""Configs of a few well-known models, written out so that nothing has to be fetched to plan or to measure them."""

from collections.abc import Callable

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from kvframe.errors import ConfigError
from kvframe.suggest import hint


def llama_3_1_8b() -> LlamaConfig:
    """Llama-3.1-8B."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )


def qwen3_8b() -> Qwen3Config:
    """Qwen3-8B."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )


_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {"llama-3.1-8b": llama_3_1_8b, "qwen3-8b": qwen3_8b}
SHAPE_NAMES = tuple(_CONFIGS)


def named_config(name: str) -> PreTrainedConfig:
    """A fresh config by its name. Raises ConfigError for a name there is none of."""
    if name not in _CONFIGS:
        raise ConfigError(f"there is no built-in shape {name!r}{hint(name, SHAPE_NAMES)}")
    return _CONFIGS[name]()
