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
from kvframe.hf.support import decoder_config

# Older ones restart a chunked prefill at position 0 when the cache is not empty, and answer wrongly without a word.
_WARM_CHUNKED_PREFILL = Version("5.23.0")


@frozen(kw_only=True)
class GenerateCall:
    """The arguments of one call of `model.generate` that matter to the cache."""

    arguments: dict[str, Any]
    """By name, `generate`'s own keyword arguments flattened in."""
    prompt_end: int
    """Tokens of a row, padding and earlier turns included, when generation starts."""
    max_length: int | None
    """The same when it ends at the latest; None where nothing bounds it."""


def read_call(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerateCall:
    """Arguments of a call, checked.

    Raises UnsupportedCallError for beam search, `use_cache=False`, `output_attentions` and a warm chunked prefill that the installed
    transformers gets wrong; PaddingError for masks that are not left padding; CacheMismatchError for a cache that is not this
    model's.
    """
    bound = inspect.signature(type(model).generate).bind(model, *args, **kwargs).arguments
    bound.pop("self", None)
    arguments = {**bound, **bound.pop("kwargs", {})}
    settings = arguments.get("generation_config") or model.generation_config

    def setting(name: str) -> Any:
        value = arguments.get(name)
        return getattr(settings, name, None) if value is None else value

    if (setting("num_beams") or 1) > 1:
        raise UnsupportedCallError("beam search would permute the host pool at every step; use num_beams=1")
    if arguments.get("use_cache", getattr(settings, "use_cache", True)) is False:
        raise UnsupportedCallError(
            "use_cache=False leaves nothing for a policy to manage; drop it, or detach the model"
        )
    if setting("output_attentions"):
        raise UnsupportedCallError("output_attentions: there is no full row of attention weights under retrieval")
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        num_padding(mask)
    cache = arguments.get("past_key_values")
    if cache is not None:
        _check_cache(model, cache, setting("prefill_chunk_size"))
    prompt_end = _prompt_end(arguments, mask)
    return GenerateCall(arguments=arguments, prompt_end=prompt_end, max_length=_max_length(setting, prompt_end))


def _check_cache(model: PreTrainedModel, cache: object, prefill_chunk_size: int | None) -> None:
    if not isinstance(cache, RetrievalCache):
        raise CacheMismatchError(
            f"past_key_values is a {type(cache).__name__}; expected the RetrievalCache of an earlier call (run.cache), or none for a "
            "fresh one"
        )
    config = decoder_config(model)
    if cache.config is not config and cache.config.to_dict() != config.to_dict():
        raise CacheMismatchError("the cache belongs to a model with another config; make a new one for this model")
    if prefill_chunk_size and cache.get_seq_length() and Version(transformers.__version__) < _WARM_CHUNKED_PREFILL:
        raise UnsupportedCallError(
            f"transformers {transformers.__version__} reads the whole prompt again when prefill_chunk_size meets a filled cache; use "
            f"{_WARM_CHUNKED_PREFILL} or later, or leave prefill_chunk_size out"
        )


def _prompt_end(arguments: dict[str, Any], mask: Tensor | None) -> int:
    if isinstance(mask, Tensor):
        return int(mask.shape[1])
    for name in ("inputs", "input_ids", "inputs_embeds"):
        value = arguments.get(name)
        if isinstance(value, Tensor):
            return int(value.shape[1])
    return 1  # transformers starts from the BOS token


def _max_length(setting: Any, prompt_end: int) -> int | None:
    new_tokens, total = setting("max_new_tokens"), setting("max_length")
    if new_tokens is not None:
        return prompt_end + int(new_tokens)
    return None if total is None else max(int(total), prompt_end + 1)
