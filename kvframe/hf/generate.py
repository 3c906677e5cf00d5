"""What `generate` was asked for, checked before anything starts."""

import inspect
from typing import Any

import transformers
from attrs import frozen
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel

from kvframe.errors import CacheMismatchError, UnsupportedCallError
from kvframe.hf.cache import RetrievalCache
from kvframe.hf.padding import num_padding

# Older ones restart a chunked prefill at position 0 when the cache is not empty, and answer wrongly without a word.
_WARM_CHUNKED_PREFILL = Version("5.23.0")


@frozen(kw_only=True)
class GenerateCall:
    """The arguments of one call of `model.generate`, and what of them matters to the cache."""

    arguments: dict[str, Any]
    """By name, `generate`'s own keyword arguments flattened in; all but the cache."""
    cache: RetrievalCache | None
    """The cache that was passed."""
    batch_size: int
    """Sequences to be generated."""
    prompt_end: int
    """Tokens of a row, padding and earlier turns included, when generation starts."""
    max_length: int | None
    """The same when it ends at the latest; None where nothing bounds it."""


def read_call(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerateCall:
    """Arguments of a call, checked.

    Raises UnsupportedCallError for beam search, `use_cache=False`, `output_attentions` and ways to generate that bring
    a cache of their own; PaddingError for masks that are not left padding; CacheMismatchError for a cache that is not
    this model's, or that the inputs do not continue.
    """
    original: Any = type(model).generate  # type: ignore[attr-defined]  # a generative model has it
    arguments = dict(inspect.signature(original).bind(model, *args, **kwargs).arguments)
    arguments.pop("self", None)
    arguments |= arguments.pop("kwargs", {})
    settings = (arguments.get("generation_config"), model.generation_config)

    def setting(name: str) -> Any:
        values = (arguments.get(name), *(getattr(config, name, None) for config in settings))
        return next((value for value in values if value is not None), None)

    _check_settings(model, setting, arguments)
    if setting("cache_implementation") is not None:
        # It would clash with the cache that is passed, even where it comes from generation_config.json.
        arguments["cache_implementation"] = None
    cache = arguments.pop("past_key_values", None)
    num_rows, num_inputs = _input_shape(arguments)
    batch_size = num_rows * (setting("num_return_sequences") or 1)
    mask, padding, prompt_end = arguments.get("attention_mask"), None, num_inputs
    if isinstance(mask, Tensor) and mask.dim() == 2:  # transformers refuses others
        padding, prompt_end = num_padding(mask), int(mask.shape[1])
    if cache is not None:
        _check_cache(model, cache, setting("prefill_chunk_size"))
        if cache.get_seq_length():
            _check_continues(cache, batch_size, num_inputs, prompt_end)
            if "inputs_embeds" in arguments and num_inputs != prompt_end:
                raise CacheMismatchError(
                    f"inputs_embeds of {num_inputs} tokens came with a mask over {prompt_end}; expected the embeddings "
                    "of all tokens of the conversation, or input_ids"
                )
            if padding is not None and len(padding) == batch_size:
                cache.check_padding(padding, batch_size, cache.get_seq_length())
    return GenerateCall(
        arguments=arguments,
        cache=cache,
        batch_size=batch_size,
        prompt_end=prompt_end,
        max_length=_max_length(setting, prompt_end),
    )


def _check_settings(model: PreTrainedModel, setting: Any, arguments: dict[str, Any]) -> None:
    if (setting("num_beams") or 1) > 1:
        raise UnsupportedCallError(
            f"num_beams={setting('num_beams')}: beam search would permute the host pool at every step; use num_beams=1"
        )
    if setting("use_cache") is False:
        raise UnsupportedCallError(
            "use_cache=False leaves nothing for a policy to manage; leave it out, or detach the model"
        )
    if setting("output_attentions") or model.config.get_text_config(decoder=True).output_attentions:
        raise UnsupportedCallError(
            "output_attentions: there is no full row of attention weights under retrieval; leave it out, or detach the "
            "model"
        )
    if arguments.get("cache_implementation") == "paged":
        raise UnsupportedCallError(
            "cache_implementation='paged' is continuous batching, which brings a cache of its own; leave it out"
        )
    for name in ("assistant_early_exit", "use_mtp"):
        if setting(name):
            raise UnsupportedCallError(
                f"{name}: the model would propose tokens to itself over the same cache; use an assistant_model or "
                "prompt_lookup_num_tokens"
            )


def _input_shape(arguments: dict[str, Any]) -> tuple[int, int]:
    for name in ("inputs_embeds", "inputs", "input_ids"):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim() >= 2:
            return int(value.shape[0]), int(value.shape[1])
    return 1, 1  # transformers starts from the BOS token


def _check_cache(model: PreTrainedModel, cache: object, prefill_chunk_size: int | None) -> None:
    if not isinstance(cache, RetrievalCache):
        raise CacheMismatchError(
            f"past_key_values is a {type(cache).__name__}; expected the RetrievalCache of an earlier call (run.cache), "
            "or none for a fresh one"
        )
    if not cache.is_for(model):
        raise CacheMismatchError(
            "past_key_values was made for another model; expected the cache of this one (run.cache or run.new_cache())"
        )
    if prefill_chunk_size and cache.get_seq_length() and Version(transformers.__version__) < _WARM_CHUNKED_PREFILL:
        raise UnsupportedCallError(
            f"transformers {transformers.__version__} reads the whole prompt again when prefill_chunk_size meets a "
            f"filled cache; use {_WARM_CHUNKED_PREFILL} or later, or leave prefill_chunk_size out"
        )


def _check_continues(cache: RetrievalCache, batch_size: int, num_inputs: int, prompt_end: int) -> None:
    if batch_size != cache.batch_size:
        raise CacheMismatchError(
            f"a batch of {batch_size} sequences came, but the cache holds {cache.batch_size}; expected the same batch, "
            "or a new cache"
        )
    num_cached = cache.get_seq_length()
    num_expected = prompt_end - num_cached
    if num_expected < 1 or num_inputs not in (prompt_end, num_expected):
        raise CacheMismatchError(
            f"{num_inputs} tokens and an attention_mask over {prompt_end} do not continue a cache of {num_cached}; "
            "expected all tokens of the conversation, or those not yet cached with a mask over all (the last token "
            "generated is not cached yet)"
        )


def _max_length(setting: Any, prompt_end: int) -> int | None:
    new_tokens, total = setting("max_new_tokens"), setting("max_length")
    if new_tokens is not None:
        return prompt_end + int(new_tokens)
    return None if total is None else max(int(total), prompt_end + 1)
