"""Tiny random models, prompts and policies for the tests of the boundary to transformers."""

import functools
from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel

import kvframe
from kvframe import Policy

VERSION = Version(transformers.__version__)

VOCAB_SIZE = 128
PROMPT_TOKENS = 40
PADDING = 9
NEW_TOKENS = 24

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}

# What makes each family itself; the rest is common.
_FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma3": {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "Mixtral": {"num_local_experts": 4, **_EXPERTS},
    "Qwen3Next": {
        "head_dim": 16,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "full_attention"],
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
        **_EXPERTS,
        **_LINEAR,
    },
    "Lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "full_attention"]},
    "Jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "Mistral": {"sliding_window": 16},
}
_CONFIG_NAMES = {"Gemma3": "Gemma3TextConfig"}


def make_config(family: str, **changes: Any) -> Any:
    """The tiny config of a family."""
    config_cls = getattr(transformers, _CONFIG_NAMES.get(family, f"{family}Config"))
    return config_cls(**_COMMON | _FAMILIES[family] | changes)


def make_model(family: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes: Any) -> Any:
    """A new tiny model that nobody else holds, always with the same weights."""
    torch.manual_seed(0)
    model_cls = getattr(transformers, f"{family}ForCausalLM")
    config = make_config(family, attn_implementation=attention, **changes)
    return randomise(model_cls(config)).to(dtype).eval()


@functools.cache
def model_of(family: str) -> Any:
    """The tiny model of a family, shared by all tests: each leaves it as it was."""
    return make_model(family)


@torch.no_grad()
def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Weights under which attention is far from uniform, so that a token missed shows in the logits."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim >= 2 and parameter.is_floating_point():
            wide = "q_proj" in name or "k_proj" in name
            parameter.normal_(0.0, (2.0 if wide else 1.0) * parameter.shape[-1] ** -0.5)
    return model


class Prompt(NamedTuple):
    """Token ids and their mask; calls take it as keyword arguments through `_asdict()`."""

    input_ids: Tensor
    attention_mask: Tensor


def make_prompt(
    *, batch_size: int = 2, num_tokens: int = PROMPT_TOKENS, padding: int = PADDING, seed: int = 0
) -> Prompt:
    """Random tokens; every row but the first is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (batch_size, num_tokens), generator=generator)
    mask = torch.ones_like(ids)
    ids[1:, :padding] = 0
    mask[1:, :padding] = 0
    return Prompt(ids, mask)


class Answer(NamedTuple):
    """What `generate` gave."""

    tokens: Tensor
    """[B, L], the prompt included."""
    logits: Tensor
    """[B, new tokens, vocabulary]"""


def generate(model: PreTrainedModel, prompt: Prompt | None = None, **changes: Any) -> Answer:
    """Greedy generation of NEW_TOKENS tokens, whatever they are."""
    prompt = make_prompt() if prompt is None else prompt
    num_tokens = changes.get("max_new_tokens", NEW_TOKENS)
    settings = {"do_sample": False, "max_new_tokens": num_tokens, "min_new_tokens": num_tokens}
    result = model.generate(**prompt._asdict(), **settings | changes, return_dict_in_generate=True, output_logits=True)
    return Answer(result.sequences, torch.stack(result.logits, 1).float())


def louiskv(token_budget: int = 256, **changes: Any) -> Policy:
    """LouisKV so small that a short text goes through all of it; the budget holds any text of these tests."""
    options = {"sink_size": 4, "window_size": 8, "cluster_size": 4, "tau": 2.0, "dense_layers": ()}
    return kvframe.policy("louiskv", token_budget=token_budget, **options | changes)


def tight(**changes: Any) -> Policy:
    """The same with room for a part of the text only."""
    return louiskv(token_budget=12, **changes)


def assert_same(actual: Answer, expected: Answer, tolerance: float = 1e-4) -> None:
    """Same tokens, and logits within the tolerance."""
    assert actual.tokens.tolist() == expected.tokens.tolist()
    assert float((actual.logits - expected.logits).abs().max()) <= tolerance


def implementations(model: PreTrainedModel) -> list[str | None]:
    """What every config in the model names, its modules' and those inside other configs."""
    found = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            parts = [getattr(module.config, name, None) for name in module.config.sub_configs]
            found += [config._attn_implementation for config in (module.config, *parts) if config is not None]
    return found


def tiny_llava() -> Any:
    """A model that sees, with a Llama for its text."""
    text = {name: value for name, value in _COMMON.items() if name != "max_position_embeddings"}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4, projection_dim=16),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=VOCAB_SIZE - 1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return randomise(transformers.LlavaForConditionalGeneration(config)).eval()
