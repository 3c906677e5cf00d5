"""The cache that transformers sees: one object a model layer, ours where a full KV cache would grow."""

import copy
import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from attrs import evolve
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvframe.composition import Policy
from kvframe.dense_layer import DenseLayer
from kvframe.errors import (
    CacheMismatchError,
    ConfigError,
    KvframeError,
    NotAttachedError,
    PaddingError,
    UnsupportedCallError,
    UnsupportedModelError,
)
from kvframe.hf.cache_layer import KEYS_CHANGED, RetrievalCacheLayer, outside_inference_mode
from kvframe.hf.memory_needs import MemoryNeeds
from kvframe.hf.padding import num_padding
from kvframe.hf.rope import relative_rotation
from kvframe.hf.support import (
    ATTENTION_NAME,
    check_model,
    decoder_config,
    decoder_of,
    is_retrieval_layer,
    kv_shape,
    stock_layers,
)
from kvframe.layer import LayerRuntime
from kvframe.memory.link import link_of
from kvframe.memory.token_ids import TokenIds
from kvframe.registry import Registry, default_registry
from kvframe.report import Report, Timeline, make_report
from kvframe.runtime import RetrievalLayer
from kvframe.stages import SLOTS
from kvframe.types import Board, Execution, LayerLayout, ModelLayout

Extend = Literal["full", "retrieve"]

# Rows planned for a cache that was not told how long it will get.
_UNPLANNED_ROWS = 1024


class RetrievalCache(Cache):
    """A Cache whose full-attention layers follow a policy; sliding, linear and conv layers stay transformers' own.

    Use it through `kvframe.attach`, or pass it as `past_key_values` to a model loaded with
    attn_implementation="kvframe" (after `import kvframe.hf`). It serves one batch of sequences of one model. A forward
    pass that fails leaves it empty, unless nothing of that pass had been taken in yet.
    """

    prompt_end: int | None
    """Length, padding included, up to which tokens are prompt; None where nobody has said it."""
    timeline: Timeline
    _next_place: int
    """The managed layer that has to come next."""
    _is_decode: bool
    """Whether the pass that is going on generates."""
    _mask: tuple[Tensor, int] | None
    """The last mask that was read, and up to which column."""
    _padding: list[int] | None
    """Leading padding of every row; None for none so far."""
    _in_flight_bytes: int
    epoch: int
    """Counts whatever may have moved memory, or changed what the next pass is, other than plain decode steps."""
    capture_reason: str | None
    """Why the last decode step was not replayed as a CUDA graph; None where it was, or where nobody tried."""
    cannot_be_captured: str | None
    """Why none can be, once that has shown."""
    num_replayed: int
    """Decode steps that were replayed."""

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        execution: Execution = "offload",
        max_length: int | None = None,
        extend: Extend = "full",
        registry: Registry | None = None,
    ) -> None:
        """A cache for one batch of sequences of `model`.

        execution: "offload" is the real thing; "dense" keeps all KV on the device and attends under a mask; "shadow"
            lets full attention drive and only watches the policy.
        max_length: tokens a sequence, prompt and output, that memory is planned for; more can come at the cost of
            allocations.
        extend: what a call with several tokens on a filled cache means where nobody says it (`generate` of an attached
            model does): more prompt, attended in full, or proposed tokens, which retrieve like decoding.

        Raises UnsupportedModelError for a model that cannot be served, ConfigError for a policy that does not fit it,
        HostMemoryError where not even one sequence of `max_length` tokens fits.
        """
        check_model(model)
        _check_arguments(policy, execution, max_length, extend)
        self.policy = policy
        self.execution: Execution = execution
        self.max_length = max_length
        self.extend: Extend = extend
        self.config = decoder_config(model)
        # Not a strong reference: a cache that is kept for its report does not keep the model.
        self._decoder = weakref.ref(decoder_of(model))
        self._registry = registry if registry is not None else default_registry()
        layers = stock_layers(self.config)
        self._managed: list[RetrievalCacheLayer] = []
        for layer_idx, layer in enumerate(layers):
            if is_retrieval_layer(layer):
                self._managed.append(RetrievalCacheLayer(self, layer_idx, place=len(self._managed)))
                layers[layer_idx] = self._managed[-1]
        super().__init__(layers=layers)
        self._memory = MemoryNeeds(
            policy=policy,
            execution=execution,
            num_layers=len(layers),
            managed=tuple(layer.layer_idx for layer in self._managed),
        )
        self._num_passes = 0
        self.epoch = 0
        self._is_recording = False
        self._has_prompt_buffers = False
        self.cannot_be_captured = None
        self._board: Board = {}
        self._token_ids: TokenIds | None = None
        self._forget()
        self._expected = self._expected_layout(model)
        self._check_policy(model)
        if max_length is not None:
            self._memory.check_host(self._expected, max_length, [])

    def _expected_layout(self, model: PreTrainedModel) -> LayerLayout:
        """One sequence in one layer, as far as the config tells; keys and values will tell exactly."""
        num_kv_heads, head_dim = kv_shape(self.config)
        return LayerLayout(
            layer_idx=0, num_layers=len(self.layers), batch_size=1, num_qo_heads=num_kv_heads,
            num_kv_heads=num_kv_heads, head_dim=head_dim, value_dim=head_dim, dtype=model.dtype, device=model.device,
            sm_scale=1.0, rotate=relative_rotation(decoder_of(model)),
        )  # fmt: skip

    def _check_policy(self, model: PreTrainedModel) -> None:
        dense = self.policy.dense_layers
        if dense != "all" and (outside := [layer for layer in dense if layer >= len(self.layers)]):
            raise ConfigError(
                f"dense_layers names layer {outside[0]}, the model has layers 0 to {len(self.layers) - 1}"
            )
        layout = ModelLayout(
            num_layers=len(self.layers),
            retrieval_layers=tuple(layer.layer_idx for layer in self._managed),
            device=model.device,
            dtype=model.dtype,
        )
        problems = self._registry.plugins.check_policy(self.policy, layout)
        if problems:
            raise ConfigError("the policy does not fit:\n" + "\n".join(f"- {problem}" for problem in problems))
        # State that a stage cannot make for this model is an error now, not in the first forward pass.
        retrieving = [layer.layer_idx for layer in self._managed if not self.policy.is_dense(layer.layer_idx)]
        expected = evolve(self._expected, device=torch.device("cpu"), layer_idx=min(retrieving, default=0))
        self.policy.trigger.init(expected)
        if retrieving:
            self.policy.units.init(expected)
            self.policy.scorer.init(expected)

    # ---- one forward pass -------------------------------------------------------------------------------------------

    def layer_begins(self, layer: RetrievalCacheLayer, num_new: int) -> None:
        """A layer's keys and values are there. Raises if the pass before left something undone."""
        for earlier in (self._managed[layer.place - 1], layer):
            if earlier.is_waiting:
                raise self._not_reached(earlier)
        if layer.place != self._next_place:
            expected = self._managed[self._next_place].layer_idx
            self.release()
            raise CacheMismatchError(
                f"layer {layer.layer_idx} came where layer {expected} was expected: the forward pass before this one "
                "was broken off, or the model skips layers; the cache is empty now, start again from the prompt"
            )
        if layer.place == 0 and not self._is_recording:
            self._is_decode = self.num_prompt_tokens(layer.get_seq_length(), num_new) == 0
            if self._is_decode:
                self.step_begins()
            else:
                self._prompt_begins()
            if not self._is_decode or num_new > 1:
                self.epoch += 1

    def _prompt_begins(self) -> None:
        self._has_prompt_buffers = True
        self._num_passes += 1
        self.timeline.forward_begins(is_decode=False)

    def step_begins(self) -> None:
        """A decode step starts, here or as a replay."""
        if self._has_prompt_buffers:
            # What the prompt's copies went through is of no use to decoding.
            self._has_prompt_buffers = False
            link_of(self.device).free_buffers()
        self._num_passes += 1
        self.timeline.forward_begins(is_decode=True)

    def layer_takes(self, layer: RetrievalCacheLayer) -> None:
        """A layer takes its tokens in; from here on a failure leaves nothing to go back to."""
        self._next_place = layer.place + 1

    def following(self, layer: RetrievalCacheLayer) -> LayerRuntime | None:
        """What holds the KV of the managed layer after this one; None for the last, or before there is one."""
        return self._managed[layer.place + 1].runtime if layer.place + 1 < len(self._managed) else None

    def layer_ends(self) -> None:
        """A layer has attended."""
        if self._next_place == len(self._managed):
            self._next_place = 0
            if self._is_decode and not self._is_recording:
                self._tell_observers()

    def _tell_observers(self) -> None:
        if self._registry.plugins.has_observers:
            self._registry.plugins.step_finished(self)

    # ---- steps that a CUDA graph repeats ----------------------------------------------------------------------------

    def reason_against_capture(self) -> str | None:
        """Why decode steps over this cache cannot be one CUDA graph; None where they can."""
        if self.cannot_be_captured is None and self.batch_size > 0:
            self.cannot_be_captured = self._reason_against_capture()
        return self.cannot_be_captured

    def _reason_against_capture(self) -> str | None:
        device = self._managed[0].runtime.layout.device if self._managed[0].runtime else torch.device("cpu")
        if device.type != "cuda":
            return f"the model runs on {device.type}; CUDA graphs need a CUDA device"
        if self.execution != "offload":
            return f"execution={self.execution!r} looks at device values in every step"
        for layer_idx, layer in enumerate(self.layers):
            if not isinstance(layer, RetrievalCacheLayer):
                return f"layer {layer_idx} keeps a stock cache ({type(layer).__name__}), which reallocates"
        for slot in SLOTS:
            for stage in self.policy.stage(slot).with_parts():
                if not stage.capturable:
                    return f"the {slot} stage {stage.name!r} does not say that it is capturable"
        return None

    def prepare_step(self) -> int:
        """Do what has to be done before a token is decoded; says how many can be before that is needed again."""
        for runtime in self._runtimes():
            runtime.prepare_decode(1)
        return min(runtime.steps_left() for runtime in self._runtimes())

    def addresses(self) -> tuple[int, ...]:
        """What differs if a tensor of a layer was allocated anew."""
        return tuple(address for runtime in self._runtimes() for address in runtime.addresses())

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A pass is recorded and not run: the host's part of it is left out."""
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False
            self._next_place = 0
            for layer in self._managed:
                layer.drop_pending()

    @property
    def is_recording(self) -> bool:
        """Whether the pass that is going on is only recorded."""
        return self._is_recording

    def step_was_replayed(self) -> None:
        """The device takes a recorded step; what the host knows of it."""
        for layer in self._managed:
            layer.count_replayed()
        self.num_replayed += 1
        self._is_decode = True
        self._tell_observers()

    def _not_reached(self, layer: RetrievalCacheLayer) -> KvframeError:
        self.abandon()
        if self.config._attn_implementation == ATTENTION_NAME:
            return UnsupportedModelError(f"layer {layer.layer_idx}: {KEYS_CHANGED}")
        return NotAttachedError(
            f"layer {layer.layer_idx}: keys and values never reached kvframe's attention; call the model inside `with "
            "kvframe.attach(model, policy)`, or load it with attn_implementation='kvframe'"
        )

    def abandon(self) -> None:
        """A forward pass has failed: as before it if nothing of it was taken in yet, otherwise empty."""
        for layer in self._managed:
            layer.drop_pending()
        if self._is_recording:
            return  # nothing has run
        # Stock layers in front have taken their tokens in, and cannot give them back.
        if self._next_place > 0 or self._managed[0].layer_idx > 0:
            self.release()

    @contextmanager
    def one_call(self, prompt_end: int, max_length: int | None, batch_size: int) -> Iterator[None]:
        """One call of `generate`. Raises HostMemoryError before anything is changed if it cannot be held.

        Whatever goes wrong after the first forward pass has begun, memory running out included, empties the cache.
        """
        self._plan(max_length, batch_size)
        num_passes = self._num_passes
        self.prompt_end = prompt_end
        self.timeline.call_begins()
        try:
            yield
            if self._managed[-1].is_waiting:
                raise self._not_reached(self._managed[-1])
            self.check_finite()
        except BaseException:
            if self._num_passes > num_passes:
                self.release()
            raise
        finally:
            self.prompt_end = None
            self.timeline.call_ends()

    def num_prompt_tokens(self, length: int, num_new: int) -> int:
        """How many of the tokens that follow `length` belong to a prompt or to a turn's text."""
        if self.prompt_end is not None:
            return min(num_new, max(0, self.prompt_end - length))
        is_prompt = length == 0 or (num_new > 1 and self.extend == "full")
        return num_new if is_prompt else 0

    def num_real_tokens(
        self, length: int, num_new: int, batch_size: int, mask: Tensor | None, *, is_prompt: bool
    ) -> list[int]:
        """Of the tokens that follow `length`, those of every row that are not padding."""
        if mask is not None and mask.dim() != 2:
            raise UnsupportedCallError(
                f"a custom {mask.dim()}D attention mask came; expected the 2D padding mask [batch, tokens] or none"
            )
        # One mask serves all layers of a pass. That of a decode step is read only where that is free: it tells nothing
        # new.
        if mask is not None and (is_prompt or mask.device.type == "cpu"):
            if self._mask is None or self._mask[0] is not mask or self._mask[1] != length + num_new:
                padding = num_padding(mask, length + num_new)
                self.check_padding(padding, batch_size, length)
                self._mask, self._padding = (mask, length + num_new), padding
        padding = self._padding or [0] * batch_size
        return [min(num_new, max(0, length + num_new - num)) for num in padding]

    def check_padding(self, padding: list[int], batch_size: int, length: int) -> None:
        """Raise PaddingError unless the padding of every row fits the `length` tokens that the cache holds."""
        if len(padding) != batch_size:
            raise PaddingError(f"attention_mask has {len(padding)} rows for a batch of {batch_size}")
        before = self._padding or [0] * batch_size
        for row, (came, was) in enumerate(zip(padding, before, strict=False)):
            # Of a row that was nothing but padding so far, more may come.
            if min(came, length) != min(was, length):
                raise PaddingError(
                    f"attention_mask row {row} has {came} tokens of padding, but the cache was filled with {was}; a "
                    "later turn keeps the padding of the first, and its text is appended to the right"
                )

    def note_in_flight(self, num_bytes: int) -> None:
        """KV of one layer's prompt tokens on its way, besides the buffers it goes through."""
        self._in_flight_bytes = max(self._in_flight_bytes, num_bytes + link_of(self.device).device_bytes)

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
            rotate=self._expected.rotate,
        )
        capacity = max(self.max_length or _UNPLANNED_ROWS, keys.shape[2])
        if layer.place == 0:
            self._memory.check_host(layout, capacity, self._runtimes())
            self._memory.pin(layout, capacity)
        scorer = self.policy.scorer
        if self.policy.is_dense(layer.layer_idx):
            publishes = layer.layer_idx in scorer.sources
            return DenseLayer(
                layout, capacity, functools.partial(scorer.publish, board=self._board) if publishes else None
            )
        backend = self._registry.plugins.attention_backend(layout, layout.device)
        return RetrievalLayer(
            layout, self.policy, capacity, self.execution, backend, board=self._board, token_ids=self._token_ids
        )

    def take_token_ids(self, ids: Tensor, mask: Tensor | None) -> None:
        """A forward pass over `ids` [B, T] begins; with the 2D padding mask, if one came."""
        length = self.get_seq_length()
        padding = [0] * ids.shape[0]
        if mask is not None and mask.dim() == 2:
            padding = num_padding(mask, length + ids.shape[1])
        if self._token_ids is None:
            self._token_ids = TokenIds(ids.shape[0], ids.device)
        starts = [max(0, length - num) for num in padding]
        stops = [max(0, length + ids.shape[1] - num) for num in padding]
        self._token_ids.enter(ids, starts, [stop - start for start, stop in zip(starts, stops, strict=True)])

    def _plan(self, max_length: int | None, batch_size: int) -> None:
        """Make room for sequences of `max_length` tokens."""
        if self.get_seq_length() == 0 and self.batch_size not in (-1, batch_size):
            self.release()
        if max_length is None:
            return
        runtimes = self._runtimes()
        layout = runtimes[0].layout if runtimes else evolve(self._expected, batch_size=batch_size)
        self._memory.check_host(layout, max_length, runtimes)
        self._memory.check_device(layout, max_length, runtimes)
        self.max_length = max(self.max_length or 0, max_length)
        self.epoch += 1
        with outside_inference_mode():
            for runtime in runtimes:
                runtime.reserve(max_length)

    def _runtimes(self) -> list[LayerRuntime]:
        return [layer.runtime for layer in self._managed if layer.runtime is not None]

    # ---- what transformers asks -------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._expected.device

    @property
    def batch_size(self) -> int:
        """Sequences in the batch; -1 before the first forward pass."""
        runtime = self._managed[0].runtime
        return -1 if runtime is None else runtime.layout.batch_size

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens of every sequence.

        Raises CacheMismatchError, with nothing changed, where a sequence has fewer.
        """
        first = self._managed[0]
        first.check_crop(first.num_cropped(tokens_to_remove))
        self.epoch += 1
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """As at the start; what was allocated is used again."""
        for layer in self._managed:
            layer.reset()
        self._reset_stock_layers()
        self._forget()

    def release(self) -> None:
        """Give back all memory; the cache is empty and can be used again."""
        for layer in self._managed:
            layer.release()
        self._token_ids = None
        self._reset_stock_layers()
        self._forget()

    def _reset_stock_layers(self) -> None:
        for layer_idx, fresh in enumerate(stock_layers(self.config)):
            if isinstance(fresh, DynamicLayer) and not is_retrieval_layer(fresh):
                # Transformers 5.17 fills a sliding layer with zeros where 5.23 empties it.
                self.layers[layer_idx] = fresh
            elif not is_retrieval_layer(fresh):
                self.layers[layer_idx].reset()

    def _forget(self) -> None:
        self.prompt_end = None
        self.timeline = Timeline()
        self.epoch += 1
        self.capture_reason = None
        self.num_replayed = 0
        self._next_place = 0
        self._is_decode = False
        self._mask = None
        self._padding = None
        self._in_flight_bytes = 0
        self._board.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "RetrievalCache":
        # Model, policy and plugins are not part of what is remembered.
        for shared in (self.config, self.policy, self._registry, self._memory):
            memo[id(shared)] = shared
        twin: RetrievalCache = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        vars(twin).update((name, copy.deepcopy(value, memo)) for name, value in vars(self).items())
        for layer in twin._managed:
            layer.belong_to(twin)
        return twin

    # ---- what users ask ---------------------------------------------------------------------------------------------

    @property
    def managed_layers(self) -> list[RetrievalCacheLayer]:
        """The layers that follow the policy, dense ones included."""
        return list(self._managed)

    def is_for(self, model: PreTrainedModel) -> bool:
        """Whether the cache was made for this very model."""
        return self._decoder() is decoder_of(model)

    def module(self, layer_idx: int) -> torch.nn.Module:
        """The attention module that fills a managed layer."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, RetrievalCacheLayer)
        return layer.module

    def attended_positions(self, layer_idx: int, batch: int = 0, kv_head: int = 0) -> Tensor:
        """Positions, counted from a sequence's first real token, that a head attended to in the last decode step."""
        layer = next((layer for layer in self._managed if layer.layer_idx == layer_idx), None)
        if layer is None or layer.runtime is None:
            filled = [layer.layer_idx for layer in self._managed if layer.runtime is not None]
            raise ConfigError(f"layer {layer_idx} holds nothing under the policy; managed layers that do: {filled}")
        return layer.runtime.attended_positions(batch, kv_head)

    def check_finite(self) -> None:
        """Raise NonFiniteError if any layer has met NaN or infinity; reads the device."""
        for runtime in self._runtimes():
            runtime.raise_if_not_finite()

    def report(self) -> Report:
        """What has happened since the cache was made or reset; reads the device."""
        return make_report(
            self.policy,
            self.execution,
            self._runtimes(),
            self.timeline,
            self._in_flight_bytes,
            num_replayed=self.num_replayed,
            capture_reason=self.capture_reason,
        )


def _check_arguments(policy: object, execution: object, max_length: object, extend: object) -> None:
    if not isinstance(policy, Policy):
        raise ConfigError(f"expected a Policy, got {policy!r}; make one with kvframe.policy(name)")
    if execution not in get_args(Execution):
        raise ConfigError(f"execution must be 'offload', 'dense' or 'shadow', got {execution!r}")
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ConfigError(f"max_length must be a whole number >= 1 or None, got {max_length!r}")
    if extend not in get_args(Extend):
        raise ConfigError(f"extend must be 'full' or 'retrieve', got {extend!r}")
