"""A tokenizer of words and a tiny model that goes with it."""

import functools
from typing import Any, NamedTuple

import pytest

from kvframe.eval.text import Haystack


class Tiny(NamedTuple):
    """A random Llama, a tokenizer that splits words and digits, and a text in its words."""

    model: Any
    tokenizer: Any
    haystack: Haystack


@functools.cache
def make_tiny() -> Tiny:
    """Byte-level, so that every text has tokens, and offsets mean something."""
    import torch
    from cli.words import TEXT
    from hf.tiny import make_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    model = make_model(
        "Llama", dtype=torch.float64, vocab_size=len(vocabulary), max_position_embeddings=4096, num_hidden_layers=3
    )
    words = TEXT.split()
    turned = (" ".join(words[number % 19 :] + words[: number % 19]) for number in range(400))
    text = "\n\n".join(f"{number} times the {words}." for number, words in enumerate(turned))
    return Tiny(model, tokenizer, Haystack(name="words", text=text))


@pytest.fixture
def tiny() -> Tiny:
    """Shared by all tests: each leaves it as it was."""
    return make_tiny()
