"""Models of a known shape with random weights: how long a step takes does not depend on what they say."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedConfig, PreTrainedModel

from kvframe.hf.shapes import SHAPE_NAMES, named_config

SHAPES = ("tiny", *SHAPE_NAMES)


def config_of(shape: str) -> PreTrainedConfig:
    """The config of a shape; "tiny" is for trying a benchmark out. Raises ConfigError for a name there is none of."""
    if shape != "tiny":
        return named_config(shape)
    return LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
    )


def make_model(shape: str, device: torch.device) -> PreTrainedModel:
    """Random weights, made on the device: bfloat16 there, float32 on a CPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        made: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config_of(shape), dtype=dtype, attn_implementation="sdpa"
        )
    model: PreTrainedModel = made.to(device).eval()
    return model


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all but the table of embeddings, of which it takes single rows."""
    parts: Any = model
    table, head = parts.get_input_embeddings(), parts.get_output_embeddings()
    read = {id(parameter): parameter.nbytes for parameter in model.parameters()}
    if head is None or head.weight is not table.weight:
        read.pop(id(table.weight), None)
    return sum(read.values())


def random_ids(model: PreTrainedModel, batch_size: int, num_tokens: int, seed: int = 0) -> Tensor:
    """Token ids int64 [batch_size, num_tokens] on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch_size, num_tokens), generator=generator).to(model.device)


def forward(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """The next token int64 [B, 1] of every sequence, greedily; it stays on the device."""
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token: Tensor = logits[:, -1:].argmax(-1)
    return token


def prefill(model: PreTrainedModel, ids: Tensor, cache: Any, chunk: int) -> Tensor:
    """Read a prompt [B, T] in pieces of `chunk` tokens, 0 for all at once; the next token int64 [B, 1]."""
    length = ids.shape[1]
    starts = list(range(0, length, chunk or length))
    if len(starts) > 1 and length - starts[-1] == 1:
        starts.pop()  # a single token on a filled cache would be decoded
    token = ids
    for start, stop in zip(starts, [*starts[1:], length], strict=True):
        token = forward(model, ids[:, start:stop], cache)
    return token


def stock_cache(model: PreTrainedModel, *, offloading: bool = False) -> DynamicCache:
    """What `generate` uses by itself, or with cache_implementation="offloaded"."""
    return DynamicCache(config=model.config, offloading=offloading)


def fill_randomly(model: PreTrainedModel, cache: DynamicCache, batch_size: int, num_tokens: int) -> None:
    """Random keys and values for every layer: what full attention costs does not depend on them."""
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (batch_size, config.num_key_value_heads, num_tokens, head_dim)
    for layer_idx in range(config.num_hidden_layers):
        keys = torch.randn(shape, dtype=model.dtype, device=model.device)
        cache.update(keys, torch.randn_like(keys), layer_idx)


def stock_bytes(cache: DynamicCache, device: torch.device) -> int:
    """Bytes of keys and values on a device."""
    layers: Any = cache.layers
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None and tensor.device.type == device.type)
