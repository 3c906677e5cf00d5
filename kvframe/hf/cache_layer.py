"""One layer of the cache that transformers sees, where a full KV cache would grow."""

import functools
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from attrs import define
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from kvframe.errors import CacheMismatchError, UnsupportedCallError, UnsupportedModelError
from kvframe.layer import LayerRuntime

if TYPE_CHECKING:
    from kvframe.hf.cache import RetrievalCache


KEYS_CHANGED = (
    "the model changes keys or values after Cache.update, so that what attention uses is not what was cached; expected "
    "them unchanged"
)


def outside_inference_mode() -> AbstractContextManager[object]:
    """For what is written to in later calls, which may come outside of inference mode."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class NewKeysOffset(int):
    """Where keys that hold nothing of the past begin. The mask function knows a RetrievalCache by it."""


@define(eq=False)
class Pending:
    """Keys and values that `update` handed on and attention has not yet taken."""

    keys: Tensor  # [B, H, T, D]
    values: Tensor  # [B, H, T, Dv]


class RetrievalCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers types some of it only
    """One layer of a RetrievalCache.

    `update` only hands keys and values on, tagged with this layer: the trigger must see the query before anything is
    appended, and only the attention function has it.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: "RetrievalCache", layer_idx: int, place: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.belong_to(cache)
        self.layer_idx = layer_idx
        self.place = place
        """Which of the managed layers it is."""
        self.runtime: LayerRuntime | None = None
        self._module: weakref.ref[nn.Module] | None = None
        self._pending: Pending | None = None
        self._length = 0

    def belong_to(self, cache: "RetrievalCache") -> None:
        """Make `cache` the one that this is a layer of."""
        # Not a strong reference: in a cycle, gigabytes would wait for the garbage collector.
        self._cache = weakref.ref(cache)

    @property
    def cache(self) -> "RetrievalCache":
        """The cache that this is a layer of."""
        cache = self._cache()
        assert cache is not None, "a layer outlived its cache"
        return cache

    # ---- one forward pass -------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: what is allocated depends on the query as well."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand keys and values on to the attention function."""
        self.cache.layer_begins(self, key_states.shape[2])
        self._pending = Pending(keys=key_states, values=value_states)
        key_states._kvframe_layer = self  # type: ignore[attr-defined]  # the handle that the attention function finds
        return key_states, value_states

    @property
    def is_waiting(self) -> bool:
        """Whether attention has yet to take what `update` handed on."""
        return self._pending is not None

    def drop_pending(self) -> None:
        """Forget what `update` handed on."""
        self._pending = None

    def attend(
        self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sm_scale: float
    ) -> Tensor:
        """query [B, Hq, T, D], and what `update` returned; gives [B, Hq, T, Dv]."""
        pending, self._pending = self._pending, None
        if pending is None or keys is not pending.keys or values is not pending.values:
            raise UnsupportedModelError(f"layer {self.layer_idx}: {KEYS_CHANGED}")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, keys, values)):
            raise UnsupportedCallError(
                "gradients do not flow through a RetrievalCache; call the model under torch.no_grad(), or without it"
            )
        with outside_inference_mode():
            runtime = self._runtime_for(module, query, keys, values, sm_scale)
            out = self._dispatch(runtime, query, keys, values, mask)
        if not self.cache.is_recording:
            self._length += keys.shape[2]
        self.cache.layer_ends()
        return out

    def count_replayed(self) -> None:
        """A recorded step of one token was taken on the device."""
        assert self.runtime is not None
        self.runtime.count_decoded(1)
        self._length += 1

    def _runtime_for(
        self, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, sm_scale: float
    ) -> LayerRuntime:
        runtime = self.runtime
        if runtime is not None:
            changes = self._changes(runtime, module, query, keys, values)
            if not changes:
                return runtime
            if self._length:
                raise CacheMismatchError(
                    f"layer {self.layer_idx}: the cache was filled by another model or batch: {', '.join(changes)}; "
                    "make a new RetrievalCache"
                )
        self.runtime = None  # what it held is free before its successor allocates
        self.runtime = self.cache.make_runtime(self, query, keys, values, sm_scale)
        self._module = weakref.ref(module)
        return self.runtime

    def _changes(
        self, runtime: LayerRuntime, module: nn.Module, query: Tensor, keys: Tensor, values: Tensor
    ) -> list[str]:
        layout = runtime.layout
        batch_size, num_qo_heads, _, _ = query.shape
        _, num_kv_heads, _, head_dim = keys.shape
        compared = (
            ("batch_size", batch_size, layout.batch_size),
            ("num_qo_heads", num_qo_heads, layout.num_qo_heads),
            ("num_kv_heads", num_kv_heads, layout.num_kv_heads),
            ("head_dim", head_dim, layout.head_dim),
            ("value_dim", values.shape[3], layout.value_dim),
            ("dtype", keys.dtype, layout.dtype),
            ("device", keys.device, layout.device),
        )
        changes = [f"{name} {came}, expected {expected}" for name, came, expected in compared if came != expected]
        if not changes and (self._module is None or self._module() is not module):
            changes.append("an attention module of the same shape, expected the very one that filled it")
        return changes

    @property
    def module(self) -> nn.Module:
        """The attention module that fills this layer."""
        module = None if self._module is None else self._module()
        assert module is not None, "nothing has filled this layer yet, or what did is gone"
        return module

    def _dispatch(
        self, runtime: LayerRuntime, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        num_new = keys.shape[2]
        num_prompt = self.cache.num_prompt_tokens(self._length, num_new)
        num_real = self.cache.num_real_tokens(self._length, num_new, query.shape[0], mask, is_prompt=num_prompt > 0)
        self.cache.layer_takes(self)
        if self.cache.is_recording:
            return runtime.step(query, keys, values)
        if num_prompt == 0:
            return runtime.decode(query, keys, values)
        self.cache.note_in_flight(keys.nbytes + values.nbytes)
        following = self.cache.following(self)
        ahead = None if following is None else functools.partial(following.prefetch, num_real)
        return runtime.prompt(query, keys, values, num_real, num_prompt, ahead)

    # ---- what transformers asks -------------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self._length + (0 if self._pending is None else self._pending.keys.shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` returns: the new keys alone."""
        return query_length, NewKeysOffset(self.get_seq_length())

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def check_crop(self, num_tokens: int) -> None:
        """Raise CacheMismatchError unless every sequence has this many tokens to lose."""
        if self.runtime is not None and num_tokens > min(self.runtime.lengths):
            raise CacheMismatchError(
                f"crop of {num_tokens} tokens asked for, but the shortest sequence has {min(self.runtime.lengths)}; "
                "reset() the cache to empty it"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens."""
        num_tokens = self.num_cropped(tokens_to_remove)
        if num_tokens and self.runtime is not None:
            with outside_inference_mode():
                self.runtime.crop(num_tokens)
            self._length -= num_tokens

    def num_cropped(self, tokens_to_remove: int) -> int:
        """What `crop` takes back; a positive argument is the length to keep, as transformers 5.17 has it."""
        return -tokens_to_remove if tokens_to_remove <= 0 else max(0, self._length - tokens_to_remove)

    def reset(self) -> None:
        """As at the start; what was allocated is used again."""
        self._pending = None
        self._length = 0
        if self.runtime is not None:
            with outside_inference_mode():
                self.runtime.reset()

    def release(self) -> None:
        """Give back what was allocated."""
        self._pending = None
        self._length = 0
        self.runtime = None
        self._module = None

    def offload(self) -> None:
        """Nothing to do: the policy decides what lies where."""

    def prefetch(self) -> None:
        """Nothing to do: the policy decides what lies where."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search is refused."""
        raise UnsupportedCallError("beam search would permute the host pool at every step; use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused once the cache holds something."""
        self._fixed_batch("repeated")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused once the cache holds something."""
        self._fixed_batch("selected from")

    def _fixed_batch(self, verb: str) -> None:
        if self.get_seq_length() > 0:
            raise UnsupportedCallError(
                f"the batch of a RetrievalCache is fixed and cannot be {verb}; expand the inputs before the prompt is "
                "read"
            )
