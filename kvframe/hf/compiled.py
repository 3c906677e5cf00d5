"""One decode step through `torch.compile`: the model as one graph, retrieval attention as one opaque op a layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from kvframe.hf.cache import RetrievalCache

# The cache of the step that is going on: an op takes tensors and numbers only.
_cache: RetrievalCache | None = None


class StepCache(Cache):
    """What a traced forward pass sees of a RetrievalCache: keys and values come back as they were given.

    Attention takes them to the real one, inside the op.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self.num_layers = num_layers

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values as they are."""
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        """Positions are given, so nobody needs it."""
        return 0

    @property
    def is_sliding(self) -> list[bool]:
        """No layer is."""
        return [False] * self.num_layers


@torch.library.custom_op("kvframe::attend", mutates_args=())
def attend(query: Tensor, keys: Tensor, values: Tensor, layer_idx: int, sm_scale: float) -> Tensor:
    """One decode step of a layer: query [B, Hq, 1, D], keys [B, H, 1, D], values [B, H, 1, Dv] to [B, 1, Hq, Dv].

    The cache that it works on is no argument, so that the op looks pure; every call has its own query, and its result
    is used, so that none is left out or done twice.
    """
    from kvframe.hf.attention import kvframe_attention

    assert _cache is not None, "a compiled step ran outside its run"
    keys, values = _cache.update(keys, values, layer_idx)
    module = _cache.module(layer_idx)
    return kvframe_attention(module, query, keys, values, None, sm_scale)[0]


@attend.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, layer_idx: int, sm_scale: float) -> Tensor:
    batch_size, num_qo_heads, num_queries, _ = query.shape
    return query.new_empty(batch_size, num_queries, num_qo_heads, values.shape[-1])


def compiled_step(model: PreTrainedModel, backend: str = "inductor") -> Callable[..., Any]:
    """A forward pass over one token a sequence, compiled when it is first called."""
    compiled = torch.compile(model.forward, backend=backend, dynamic=False, fullgraph=True)
    # A mask of four dimensions is taken as it is, so that none is made.
    masks: dict[torch.device, Tensor] = {}

    def step(*, past_key_values: RetrievalCache, **arguments: Any) -> Any:
        global _cache
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        if device not in masks:
            masks[device] = torch.zeros(1, 1, 1, 1, device=device)
        before, _cache = _cache, past_key_values
        try:
            output = compiled(
                **arguments, attention_mask=masks[device], past_key_values=StepCache(len(past_key_values.layers))
            )
        finally:
            _cache = before
        output.past_key_values = past_key_values
        return output

    return step
