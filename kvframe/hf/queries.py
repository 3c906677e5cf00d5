"""Watching the queries of a stock model, without changing what it computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from kvframe.errors import ConfigError
from kvframe.hf.attachment import configs_of
from kvframe.hf.attention import forget, is_remembered, kvframe_attention, kvframe_mask, remember
from kvframe.hf.support import decoder_config, decoder_of

Observer = Callable[[int, Tensor], None]
"""Called with a layer's number and its queries [B, Hq, T, D], after RoPE."""

# As neutral as the name that retrieval runs under.
_OBSERVED_NAME = "kvframe-observed"

# By the identity of the watched model's config; configs cannot be hashed.
_observers: dict[int, Observer] = {}


@contextmanager
def observe_queries(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Within the block, every attention layer of the decoder shows its queries to `observer` before it attends.

    The model attends as before, with the implementation and the masks that it has. On leaving, also after an
    exception, it is as it was.

    Raises ConfigError for a model that is attached or watched already.
    """
    if is_remembered(decoder_config(model)):
        raise ConfigError("the model is attached or watched already; leave that block first")
    AttentionInterface.register(_OBSERVED_NAME, _observed_attention)
    AttentionMaskInterface.register(_OBSERVED_NAME, kvframe_mask)
    configs = configs_of(model)
    implementations = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            remember(config)
            _observers[id(config)] = observer
        decoder_of(model).set_attn_implementation(_OBSERVED_NAME)
        yield
    finally:
        for config, implementation in zip(configs, implementations, strict=True):
            config._attn_implementation_internal = implementation
            _observers.pop(id(config), None)
            forget(config)


def _observed_attention(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    observer = _observers.get(id(getattr(module, "config", None)))
    layer_idx = getattr(module, "layer_idx", None)
    if observer is not None and layer_idx is not None:
        observer(layer_idx, query)
    return kvframe_attention(module, query, *args, **kwargs)
