"""The cache that transformers sees: one object a model layer, ours where a full KV cache would grow."""

from typing import Any, Literal

import torch
from attrs import define
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvframe.dense_layer import DenseLayer
from kvframe.errors import (
    CacheMismatchError,
    ConfigError,
    HostMemoryError,
    NotAttachedError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from kvframe.hf.padding import num_padding
from kvframe.hf.rope import relative_rotation
from kvframe.hf.support import check_model, decoder_config, is_retrieval_layer, stock_layers
from kvframe.layer import LayerRuntime
from kvframe.memory.available import available_host_memory
from kvframe.policy import Policy
from kvframe.registry import Registry, default_registry
from kvframe.report import Report, Timeline, make_report
from kvframe.runtime import RetrievalLayer
from kvframe.types import Execution, LayerLayout, ModelLayout

# Rows planned for a cache that was not told how long it will get.
_UNPLANNED_ROWS = 1024


@define(eq=False)
class Pending:
    """Keys and values that `update` handed on and attention has not yet taken."""

    keys: Tensor  # [B, H, T, D]
    values: Tensor  # [B, H, T, Dv]


class RetrievalCacheLayer(CacheLayerMixin):
    """One layer of a RetrievalCache.

    `update` only hands keys and values on, tagged with this layer: the trigger must see the query before anything is appended, and
    only the attention function has it.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: "RetrievalCache", layer_idx: int) -> None:
        super().__init__()
        self.cache = cache
        self.layer_idx = layer_idx
        self.runtime: LayerRuntime | None = None
        self._pending: Pending | None = None
        self._length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: what is allocated depends on the query as well."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand keys and values on to the attention function."""
        if self._pending is not None:
            raise self._not_reached()
        self.cache.layer_begins(self, key_states.shape[2])
        self._pending = Pending(keys=key_states, values=value_states)
        key_states._kvframe_layer = self  # type: ignore[attr-defined]  # the handle that the attention function finds
        return key_states, value_states

    def _not_reached(self) -> NotAttachedError:
        return NotAttachedError(
            f"layer {self.layer_idx}: keys and values never reached kvframe's attention; call the model inside `with "
            "kvframe.attach(model, policy)`, or load it with attn_implementation='kvframe'"
        )

    def expect_idle(self) -> None:
        """Raise NotAttachedError if attention has not taken what the last forward pass handed on."""
        if self._pending is not None:
            raise self._not_reached()

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sm_scale: float) -> Tensor:
        """query [B, Hq, T, D], and what `update` returned; gives [B, Hq, T, Dv]."""
        pending, self._pending = self._pending, None
        if pending is None or keys is not pending.keys or values is not pending.values:
            raise UnsupportedModelError(
                f"layer {self.layer_idx}: the model changes keys or values after Cache.update, so that what attention uses is not what "
                "was cached"
            )
        if self.runtime is None:
            self.runtime = self.cache.make_runtime(self, query, keys, values, sm_scale)
        self._check_shape(query, keys)
        num_new = keys.shape[2]
        out = self._dispatch(self.runtime, query, keys, values, mask)
        self._length += num_new
        self.cache.layer_ends(self)
        return out

    def _dispatch(
        self, runtime: LayerRuntime, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> Tensor:
        num_new = keys.shape[2]
        num_prompt = self.cache.num_prompt_tokens(self._length, num_new)
        num_real = self.cache.num_real_tokens(self._length, num_new, mask)
        if num_prompt == 0:
            return runtime.decode(query, keys, values)
        self.cache.note_in_flight(keys.nbytes + values.nbytes)
        return runtime.prompt(query, keys, values, num_real, num_prompt)

    def _check_shape(self, query: Tensor, keys: Tensor) -> None:
        assert self.runtime is not None
        layout = self.runtime.layout
        expected = (layout.batch_size, layout.num_qo_heads, layout.num_kv_heads, layout.head_dim, layout.dtype)
        came = (query.shape[0], query.shape[1], keys.shape[1], keys.shape[3], keys.dtype)
        if came != expected:
            names = ("batch size", "query heads", "KV heads", "head_dim", "dtype")
            changed = ", ".join(
                f"{n} {c} (expected {e})" for n, c, e in zip(names, came, expected, strict=True) if c != e
            )
            raise CacheMismatchError(
                f"layer {self.layer_idx}: the cache was filled by another model or batch: {changed}; make a new RetrievalCache"
            )

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self._length + (0 if self._pending is None else self._pending.keys.shape[2])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` returns: the new keys alone."""
        return query_length, self.get_seq_length()

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens; a positive number is the length to keep, as older transformers have it."""
        num_tokens = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self._length - tokens_to_remove)
        if num_tokens == 0 or self.runtime is None:
            return
        if num_tokens > min(self.runtime.lengths):
            raise CacheMismatchError(
                f"layer {self.layer_idx}: crop of {num_tokens} tokens asked for, but the shortest sequence has "
                f"{min(self.runtime.lengths)}"
            )
        self.runtime.crop(num_tokens)
        self._length -= num_tokens

    def reset(self) -> None:
        """As at the start; what was allocated is used again."""
        self._pending = None
        self._length = 0
        if self.runtime is not None:
            self.runtime.reset()

    def release(self) -> None:
        """Give back what was allocated."""
        self._pending = None
        self._length = 0
        self.runtime = None

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
                f"the batch of a RetrievalCache is fixed and cannot be {verb}; expand the inputs before the prompt is read"
            )


class RetrievalCache(Cache):
    """A Cache whose full-attention layers follow a policy; sliding, linear and conv layers stay transformers' own.

    Use it through `kvframe.attach`, or pass it as `past_key_values` to a model loaded with attn_implementation="kvframe" (after
    `import kvframe.hf`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        execution: Execution = "offload",
        max_length: int | None = None,
        extend: Literal["full", "retrieve"] = "full",
        registry: Registry | None = None,
    ) -> None:
        """A cache for one batch of sequences of `model`.

        execution: "offload" is the real thing; "dense" keeps all KV on the device and attends under a mask; "shadow" lets full
            attention drive and only watches the policy.
        max_length: tokens a sequence, prompt and output, that memory is planned for; more can come at the cost of allocations.
        extend: what a call with several tokens on a filled cache means where nobody says it (`attach` does): more prompt, attended
            in full, or proposed tokens, which retrieve like decoding.

        Raises UnsupportedModelError for a model that cannot be served, ConfigError for a policy that does not fit it.
        """
        check_model(model)
        if execution not in ("offload", "dense", "shadow"):
            raise ConfigError(f"execution must be 'offload', 'dense' or 'shadow', got {execution!r}")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length must be >= 1, got {max_length}")
        config = decoder_config(model)
        stock = stock_layers(config)
        self.policy = policy
        self.execution: Execution = execution
        self.max_length = max_length
        self.extend = extend
        self.prompt_end: int | None = None
        """Length, padding included, up to which tokens are prompt; None where nobody has said it."""
        self.timeline = Timeline()
        self.config = config
        self._registry = registry if registry is not None else default_registry()
        self._rotate = relative_rotation(model.get_decoder())
        self._padding: list[int] | None = None
        self._mask: Tensor | None = None
        self._in_flight_bytes = 0
        layers = [RetrievalCacheLayer(self, i) if is_retrieval_layer(layer) else layer for i, layer in enumerate(stock)]
        super().__init__(layers=layers)
        self._managed = [layer for layer in layers if isinstance(layer, RetrievalCacheLayer)]
        self._check_policy(model)

    def _check_policy(self, model: PreTrainedModel) -> None:
        managed = tuple(layer.layer_idx for layer in self._managed)
        dense = self.policy.dense_layers
        if dense != "all" and (outside := [layer for layer in dense if layer >= len(self.layers)]):
            raise ConfigError(
                f"dense_layers names layer {outside[0]}, the model has layers 0 to {len(self.layers) - 1}"
            )
        layout = ModelLayout(
            num_layers=len(self.layers), retrieval_layers=managed, device=model.device, dtype=model.dtype
        )
        problems = self._registry.plugins.check_policy(self.policy, layout)
        if problems:
            raise ConfigError("the policy does not fit:\n" + "\n".join(f"- {problem}" for problem in problems))
        # State that a stage cannot make for this model is an error now, not in the first forward pass.
        self.policy.trigger.init(self._probe_layout(model))

    def _probe_layout(self, model: PreTrainedModel) -> LayerLayout:
        return LayerLayout(
            layer_idx=0, num_layers=len(self.layers), batch_size=1, num_qo_heads=1, num_kv_heads=1, head_dim=1, value_dim=1,
            dtype=model.dtype, device=torch.device("cpu"), sm_scale=1.0, rotate=self._rotate,
        )  # fmt: skip

    # ---- one forward pass -------------------------------------------------------------------------------------------

    def layer_begins(self, layer: RetrievalCacheLayer, num_new: int) -> None:
        """A layer's keys and values are there: the layers before it must have been attended."""
        if layer is self._managed[0]:
            for other in self._managed:
                other.expect_idle()
            self.timeline.forward_begins(is_decode=self.num_prompt_tokens(layer.get_seq_length(), num_new) == 0)
        else:
            self._managed[self._managed.index(layer) - 1].expect_idle()

    def layer_ends(self, layer: RetrievalCacheLayer) -> None:
        """A layer has attended."""
        if layer is self._managed[-1] and self._registry.plugins.has_observers:
            self._registry.plugins.step_finished(self)

    def num_prompt_tokens(self, length: int, num_new: int) -> int:
        """How many of the tokens that follow `length` belong to a prompt or to a turn's text."""
        if self.prompt_end is not None:
            return min(num_new, max(0, self.prompt_end - length))
        is_prompt = length == 0 or (num_new > 1 and self.extend == "full")
        return num_new if is_prompt else 0

    def num_real_tokens(self, length: int, num_new: int, mask: Tensor | None) -> list[int]:
        """Of the tokens that follow `length`, those of every row that are not padding."""
        if mask is not None:
            if mask.dim() != 2:
                raise UnsupportedCallError(
                    f"a custom {mask.dim()}D attention mask came; expected the 2D padding mask [batch, tokens] or none"
                )
            if mask is not self._mask:  # one mask serves all layers of a forward pass
                self._mask, self._padding = mask, num_padding(mask, length + num_new)
        if self._padding is None:
            return [num_new] * self.batch_rows
        return [min(num_new, max(0, length + num_new - padding)) for padding in self._padding]

    def note_in_flight(self, num_bytes: int) -> None:
        """KV of one layer's prompt tokens on its way."""
        self._in_flight_bytes = max(self._in_flight_bytes, num_bytes)

    # ---- memory -----------------------------------------------------------------------------------------------------

    def make_runtime(
        self, layer: RetrievalCacheLayer, query: Tensor, keys: Tensor, values: Tensor, sm_scale: float
    ) -> LayerRuntime:
        """What holds a layer's KV; the first one checks that the host can hold them all."""
        layout = LayerLayout(
            layer_idx=layer.layer_idx,
            num_layers=len(self.layers),
            batch_size=query.shape[0],
            num_qo_heads=query.shape[1],
            num_kv_heads=keys.shape[1],
            head_dim=keys.shape[3],
            value_dim=values.shape[3],
            dtype=keys.dtype,
            device=keys.device,
            sm_scale=sm_scale,
            rotate=self._rotate,
        )
        capacity = max(self.max_length or _UNPLANNED_ROWS, keys.shape[2])
        if self.policy.is_dense(layer.layer_idx):
            return DenseLayer(layout, capacity)
        if layer is self._first_retrieving():
            self._check_host_memory(layout, capacity)
        backend = self._registry.plugins.attention_backend(layout, layout.device)
        return RetrievalLayer(layout, self.policy, capacity, self.execution, backend)

    def _first_retrieving(self) -> RetrievalCacheLayer:
        return next(layer for layer in self._managed if not self.policy.is_dense(layer.layer_idx))

    def _check_host_memory(self, layout: LayerLayout, capacity: int) -> None:
        if self.execution != "offload":
            return
        num_layers = sum(not self.policy.is_dense(layer.layer_idx) for layer in self._managed)
        needed = num_layers * self.policy.transfer.host_bytes(layout, capacity)
        available = available_host_memory()
        if available is not None and needed > available:
            raise HostMemoryError(
                f"the KV of {capacity} tokens x {layout.batch_size} sequences in {num_layers} layers takes "
                f"{needed / 2**30:.2f} GiB of host memory, {available / 2**30:.2f} GiB are available; use a shorter context "
                "(max_new_tokens counts), a smaller batch, or more dense layers"
            )

    @property
    def batch_rows(self) -> int:
        """Sequences in the batch; 0 before the first forward pass."""
        runtime = self._managed[0].runtime
        return 0 if runtime is None else runtime.layout.batch_size

    @property
    def managed_layers(self) -> list[RetrievalCacheLayer]:
        """The layers that follow the policy, dense ones included."""
        return list(self._managed)

    def attended_positions(self, layer_idx: int, batch: int = 0, kv_head: int = 0) -> Tensor:
        """Positions, counted from a sequence's first real token, that a head attended to in the last decode step."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, RetrievalCacheLayer) or layer.runtime is None:
            raise ConfigError(
                f"layer {layer_idx} holds nothing under the policy; managed layers that do: {self._filled()}"
            )
        return layer.runtime.attended_positions(batch, kv_head)

    def _filled(self) -> list[int]:
        return [layer.layer_idx for layer in self._managed if layer.runtime is not None]

    def reset(self) -> None:
        """As at the start; what was allocated is used again."""
        super().reset()
        self._forget()

    def release(self) -> None:
        """Give back all memory; the cache is empty and can be used again."""
        for layer in self.layers:
            if isinstance(layer, RetrievalCacheLayer):
                layer.release()
            else:
                layer.reset()
        self._forget()

    def _forget(self) -> None:
        self.prompt_end = None
        self.timeline = Timeline()
        self._padding = None
        self._mask = None
        self._in_flight_bytes = 0

    def check_finite(self) -> None:
        """Raise NonFiniteError if any layer has met NaN or infinity; reads the device."""
        for layer in self._managed:
            if layer.runtime is not None:
                layer.runtime.raise_if_not_finite()

    def report(self) -> Report:
        """What has happened since the cache was made or reset; reads the device."""
        runtimes = [layer.runtime for layer in self._managed if layer.runtime is not None]
        return make_report(self.policy, self.execution, runtimes, self.timeline, self._in_flight_bytes)
