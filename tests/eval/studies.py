"""What the tests of studies share: a tiny model that reads bytes, and a study on it."""

from pathlib import Path
from typing import Any

import torch

import kvframe
import kvframe.eval
from kvframe.eval import Study

CONTEXT = 320


def save_tiny_model(folder: Path) -> Path:
    """A random Llama of three layers and a tokenizer whose tokens are bytes, so that any text is text to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", "</s>", *letters])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=1,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_policy(name: str = "louiskv", **options: Any) -> kvframe.Policy:
    """A policy whose sizes suit a context of a few hundred tokens."""
    sizes: dict[str, Any] = {"sink_size": 4, "window_size": 16, "dense_layers": (0,)}
    return kvframe.policy(name, **sizes | options)


def small_study(model: object, **changes: Any) -> Study:
    """A study of four variants on one task, at two budgets."""
    settings: dict[str, Any] = {
        "model": model,
        "tasks": [kvframe.eval.task("copy", copy_tokens=12, cue_tokens=4)],
        "base": small_policy(),
        "vary": {"trigger": [kvframe.EveryStep(), ("rarely", kvframe.FixedStride(stride=8))]},
        "policies": [kvframe.policy("full")],
        "token_budget": [16, 32],
        "context": CONTEXT,
        "watch": 12,
    }
    return Study(**settings | changes)
