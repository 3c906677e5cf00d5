"""Decode steps of an attached model, each replayed as one CUDA graph.

The first step of a run is taken as always, and compiles what has to be compiled. The second is recorded, which runs
nothing, and from then on every step is a replay: what the host knows of a step moves on beside it. Whatever changes an
address (memory growing, another cache) makes the next step a first one again.
"""

import warnings
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor
from transformers import PreTrainedModel

from kvframe.errors import NotAttachedError
from kvframe.hf.cache import RetrievalCache
from kvframe.hf.cache_layer import outside_inference_mode

# Arguments of a forward pass that a recorded step can be given anew; all others are part of what was recorded.
_INPUTS = ("input_ids", "position_ids", "cache_position")
# Read when the prompt came; a decode step does not need it.
_UNREAD = "attention_mask"


@frozen(eq=False)
class Step:
    """One decode step that was asked for."""

    cache: RetrievalCache
    inputs: dict[str, Tensor]
    """Tensors that differ from step to step."""
    settings: dict[str, Any]
    """All other arguments but the mask."""
    shape: tuple[Any, ...]
    """What has to be the same for a recorded step to be replayed."""


@define(eq=False)
class Recording:
    """A recorded step."""

    graph: Any
    inputs: dict[str, Tensor]
    """Where the graph reads its inputs."""
    output: Any
    """The model's output, with the tensors that the graph writes."""
    key: tuple[Any, ...]
    epoch: int
    """Of the cache, when its addresses were last looked at."""
    steps_left: int
    """Replays until something has to be allocated."""


class CapturedSteps:
    """Stands for a model's `forward` while it is attached."""

    def __init__(self, model: PreTrainedModel, forward: Callable[..., Any], body: Callable[..., Any] | None) -> None:
        """forward: what runs whatever is no step; body: what is recorded, `forward` itself if None."""
        self._model = model
        self._forward = forward
        self._body = body or forward
        self._is_compiled = body is not None
        self._signature = signature(forward)
        self._recording: Recording | None = None
        self._warm: tuple[Any, ...] | None = None
        self._is_open = True

    def forget(self) -> None:
        """Another cache comes: let go of the one that was recorded, whose memory the other may need."""
        self._recording = self._warm = None

    def close(self) -> None:
        """The run is over: give the graph's memory back."""
        self._is_open = False
        self.forget()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A forward pass. Raises NotAttachedError after `close`."""
        if not self._is_open:
            raise NotAttachedError(
                "this forward belongs to a `with kvframe.attach(...)` block that is over; call the model itself"
            )
        step = self._as_step(args, kwargs)
        return self._forward(*args, **kwargs) if step is None else self._take(step)

    # ---- what is asked for ------------------------------------------------------------------------------------------

    def _as_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step | None:
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        cache, ids = arguments.get("past_key_values"), arguments.get("input_ids")
        if not isinstance(cache, RetrievalCache) or not isinstance(ids, Tensor) or ids.shape[1] != 1:
            return None
        length = cache.get_seq_length()
        if cache.num_prompt_tokens(length, 1) or not cache.is_for(self._model):
            return None
        cache.capture_reason = cache.reason_against_capture() or _reason_against(arguments)
        if cache.capture_reason is not None:
            return None
        arguments.pop(_UNREAD, None)
        inputs = {name: arguments.pop(name) for name in _INPUTS if arguments.get(name) is not None}
        if "position_ids" not in inputs:
            # What the model itself would take from the cache, on the host.
            inputs["position_ids"] = torch.full_like(ids, length)
        settings = {name: value for name, value in arguments.items() if name != "past_key_values"}
        shape = (*((name, tuple(tensor.shape)) for name, tensor in inputs.items()), *sorted(settings.items()))
        return Step(cache, inputs, settings, shape)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def _take(self, step: Step) -> Any:
        recording = self._recording_for(step)
        if recording is None:
            return self._run_first(step)
        for name, tensor in step.inputs.items():
            recording.inputs[name].copy_(tensor)
        step.cache.step_begins()
        recording.graph.replay()
        recording.steps_left -= 1
        step.cache.step_was_replayed()
        # The next replay writes over it.
        return type(recording.output)(
            **{name: value.clone() if isinstance(value, Tensor) else value for name, value in recording.output.items()}
        )

    def _recording_for(self, step: Step) -> Recording | None:
        """The recording that serves a step, made now if need be; None if the step has to be taken as always first."""
        recording, cache = self._recording, step.cache
        if recording is not None and recording.epoch == cache.epoch and recording.steps_left > 0:
            if recording.key[0] is cache and recording.key[1] == step.shape:
                return recording
        with outside_inference_mode():
            steps_left = cache.prepare_step()
        key = (cache, step.shape, cache.addresses())
        if recording is not None and recording.key == key:
            recording.epoch, recording.steps_left = cache.epoch, steps_left
            return recording
        self._recording = None
        if self._warm != key:
            self._warm = key
            return None
        self._recording = self._record(step, key, steps_left)
        return self._recording

    def _run_first(self, step: Step) -> Any:
        """A step taken as always, and watched: one that waits for the device cannot be recorded."""
        if self._is_compiled:
            return self._run(step)  # a compiler may wait as it likes
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            if before == 0:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                output = self._run(step)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in seen:
            if "synchronizing CUDA operation" in str(warning.message):
                place = f"{Path(warning.filename).name}:{warning.lineno}"
                step.cache.cannot_be_captured = f"a step waits for the device ({place})"
            elif "Synchronization debug mode is a prototype" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return output

    def _run(self, step: Step) -> Any:
        return self._body(**step.inputs, **step.settings, past_key_values=step.cache)

    def _record(self, step: Step, key: tuple[Any, ...], steps_left: int) -> Recording | None:
        cache = step.cache
        with outside_inference_mode():
            inputs = {name: tensor.clone() for name, tensor in step.inputs.items()}
        graph = torch.cuda.CUDAGraph()
        still = Step(cache, inputs, step.settings, step.shape)
        try:
            # A pool of memory for each recording: torch gives that of a graph up with the graph.
            with cache.recording(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = self._run(still)
        except Exception as error:
            # Nothing has run, so the step can be taken as always.
            cache.cannot_be_captured = f"recording a step failed: {type(error).__name__}: {error}".splitlines()[0]
            _free_generator(cache)
            return None
        return Recording(graph, inputs, output, key, cache.epoch, steps_left)


def _free_generator(cache: RetrievalCache) -> None:
    """After a failed recording torch's generator of random numbers would wait for the end of it for ever."""
    generator = torch.cuda.default_generators[cache.device.index or 0]
    generator.graphsafe_set_state(generator.clone_state())


def _reason_against(arguments: dict[str, Any]) -> str | None:
    if torch.is_grad_enabled():
        return "gradients are enabled; call the model under torch.no_grad()"
    mask = arguments.get(_UNREAD)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return "attention_mask is not the 2D padding mask"
    for name in ("output_hidden_states", "output_attentions", "labels"):
        if arguments.get(name):
            return f"{name} was asked for"
    for name, value in arguments.items():
        if isinstance(value, Tensor) and name not in (*_INPUTS, _UNREAD):
            return f"the step has the input {name}"
    return None
