"""On an attached model, whatever does not use a RetrievalCache is bit for bit what it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hf.tiny import PROMPT_TOKENS, generate, louiskv, make_model, make_prompt, model_of
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import flash_attention_mask

import kvframe
from kvframe.errors import UnsupportedModelError
from kvframe.hf import ATTENTION_NAME

CASES = pytest.mark.parametrize(
    "family, attention",
    [("Llama", "sdpa"), ("Llama", "eager"), ("Gemma3", "sdpa"), ("Gemma3", "eager"), ("Qwen3Next", "sdpa")],
)
PADDED = pytest.mark.parametrize("padding", [0, 9], ids=["no-padding", "padding"])


def stock_and_attached(model: Any, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What a call gives on the model as it is, and on the attached one."""
    expected = call()
    with kvframe.attach(model, louiskv()):
        return expected, call()


@CASES
@PADDED
@pytest.mark.parametrize("use_cache", [False, True])
def test_loss_and_gradients(family: str, attention: str, padding: int, use_cache: bool) -> None:
    """Training goes on as before."""
    model = make_model(family, attention=attention)
    prompt = make_prompt(padding=padding)
    labels = prompt.input_ids.masked_fill(prompt.attention_mask == 0, -100)

    def call() -> Tensor:
        model.zero_grad()
        loss = model(**prompt._asdict(), labels=labels, use_cache=use_cache).loss
        loss.backward()
        return torch.cat(
            [loss[None], *(weight.grad.flatten() for weight in model.parameters() if weight.grad is not None)]
        )

    expected, actual = stock_and_attached(model, call)

    assert torch.equal(actual, expected)


@CASES
@PADDED
@pytest.mark.parametrize("chunk_size", [40, 13, 1])
def test_dynamic_cache(family: str, attention: str, padding: int, chunk_size: int) -> None:
    """transformers' own cache works on an attached model: prompt, chunks, single tokens, with their padding."""
    model, prompt = make_model(family, attention=attention), make_prompt(padding=padding)

    @torch.no_grad()
    def call() -> Tensor:
        cache, logits = DynamicCache(config=model.config), []
        for start in range(0, PROMPT_TOKENS, chunk_size):
            stop = min(start + chunk_size, PROMPT_TOKENS)
            mask = prompt.attention_mask[:, :stop]
            logits.append(model(prompt.input_ids[:, start:stop], attention_mask=mask, past_key_values=cache).logits)
        return torch.cat(logits, 1)

    expected, actual = stock_and_attached(model, call)

    assert torch.equal(actual, expected)


@CASES
def test_stock_generate(family: str, attention: str) -> None:
    """The class's own `generate`, which knows nothing of the policy."""
    model, prompt = make_model(family, attention=attention), make_prompt()

    def call() -> Tensor:
        settings = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
        return torch.stack(type(model).generate(model, **prompt._asdict(), **settings).logits)

    expected, actual = stock_and_attached(model, call)

    assert torch.equal(actual, expected)


@PADDED
def test_static_cache(padding: int) -> None:
    """Keys that are longer than what has been written."""
    model, prompt = model_of("Llama"), make_prompt(padding=padding)

    @torch.no_grad()
    def call() -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=64)
        first = model(prompt.input_ids[:, :-1], attention_mask=prompt.attention_mask[:, :-1], past_key_values=cache)
        second = model(prompt.input_ids[:, -1:], attention_mask=prompt.attention_mask, past_key_values=cache)
        return torch.cat([first.logits, second.logits], 1)

    expected, actual = stock_and_attached(model, call)

    assert torch.equal(actual, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_custom_masks(attention: str) -> None:
    """A 4D mask, and texts packed into one row that are told apart by their positions."""
    model, prompt = make_model("Llama", attention=attention), make_prompt(padding=0)
    visible = torch.ones(PROMPT_TOKENS, PROMPT_TOKENS, dtype=torch.bool).tril()
    visible[:, 3] = False
    mask = torch.zeros(2, 1, PROMPT_TOKENS, PROMPT_TOKENS).masked_fill(~visible, torch.finfo(torch.float32).min)
    packed = torch.arange(PROMPT_TOKENS).fmod(PROMPT_TOKENS // 2).expand(2, -1)

    @torch.no_grad()
    def call() -> Tensor:
        own = model(prompt.input_ids, attention_mask=mask).logits
        return torch.cat([own, model(prompt.input_ids, position_ids=packed, use_cache=False).logits])

    expected, actual = stock_and_attached(model, call)

    assert torch.equal(actual, expected)
    assert not torch.equal(expected[:2], expected[2:])


def test_attention_weights() -> None:
    """Eager attention shows its weights, as long as no policy is in the way."""
    model = make_model("Llama", attention="eager")

    def call() -> Tensor:
        return torch.stack(model(make_prompt().input_ids, output_attentions=True, use_cache=False).attentions)

    expected, actual = stock_and_attached(model, call)

    assert torch.equal(actual, expected)


def test_an_implementation_that_reads_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention looks its own name up in the config, and takes the 2D mask: both are as before."""
    names, masks = [], []

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        names.append(module.config._attn_implementation)
        masks.append(mask)
        assert module.layer_idx in (0, 1) and module.training is False
        return query.transpose(1, 2), None

    model = make_model("Llama")
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_of_mine", attend)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_of_mine", flash_attention_mask)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_of_mine")
    prompt = make_prompt()
    with kvframe.attach(model, louiskv()), torch.no_grad():
        model(**prompt._asdict())

    assert names == ["flash_of_mine"] * 2
    assert all(torch.equal(mask, prompt.attention_mask.bool()) for mask in masks)
    assert model.config._attn_implementation == "flash_of_mine"


@pytest.mark.parametrize("attention", ["sdpa", ATTENTION_NAME])
def test_a_model_without_a_cache_of_ours(attention: str) -> None:
    """The same whether the model was loaded under our name or attached under another."""
    model = make_model("Gemma3", attention=attention)

    assert torch.equal(generate(model).logits, generate(model_of("Gemma3")).logits)


def test_name_loaded_models_keep_what_sdpa_would_drop() -> None:
    """Learned sinks, of a model loaded under our name, are refused rather than left out."""
    from kvframe.hf.families import build_config

    config = build_config("gpt_oss")
    config._attn_implementation = ATTENTION_NAME
    model = transformers.AutoModelForCausalLM.from_config(config).eval()

    with pytest.raises(
        UnsupportedModelError, match="passes s_aux, which sdpa attention would drop; load the model with"
    ):
        model(make_prompt().input_ids)


class Mixer(nn.Module):
    """An attention module without an eager implementation in its source file."""

    config = None


def test_nothing_to_fall_back_to() -> None:
    """A module that no implementation serves is named."""
    from kvframe.hf import attention

    config = make_model("Llama", attention="eager").config
    module, keys = Mixer(), torch.zeros(1, 2, 3, 8)
    module.config = config
    attention.remember(config)
    try:
        with pytest.raises(UnsupportedModelError, match="Mixer has no eager attention"):
            attention.kvframe_attention(module, keys, keys, keys, None)
    finally:
        attention.forget(config)
