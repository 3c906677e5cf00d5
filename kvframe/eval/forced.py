"""Teacher forcing: a model reads a prompt, and is made to say a given continuation under a policy.

The prompt is read as always, in full. Its last token and those of the continuation then go through decode steps one by
one, because that is where a policy works: trigger, selection and recall. Every token of the continuation is predicted
by such a step.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, frozen
from torch import Tensor

from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.eval.tasks.base import Sample
from kvframe.report import Report
from kvframe.types import Execution

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from kvframe.hf.cache import RetrievalCache
    from kvframe.registry import Registry

Observer = Callable[["RetrievalCache", int], None]
"""Called after each decode step with the cache and the step's number, from 0."""


@frozen(kw_only=True, eq=False)
class ForcedRun:
    """What came of one sample under one policy."""

    logits: Tensor
    """[n, vocabulary], in the model's dtype and on its device: what was predicted for each token of the
    continuation."""
    cache: "RetrievalCache"
    """As it was after the last step."""
    prefill_seconds: float
    """Of all turns' prompts."""
    decode_seconds: float
    """Of all decode steps."""
    peak_memory: int | None
    """Most bytes allocated on the CUDA device at once, the model's weights included; None elsewhere."""

    def report(self) -> Report:
        """What happened in the cache."""
        return self.cache.report()


def context_limit(config: "PreTrainedConfig") -> int | None:
    """Tokens that a model was made to read at most; None where its config does not say."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_length(config: "PreTrainedConfig", num_tokens: int, what: str) -> None:
    """Raise ConfigError for a text that is longer than what a model can read."""
    limit = context_limit(config)
    if limit is not None and num_tokens > limit:
        raise ConfigError(
            f"{what} has {num_tokens} tokens, the model reads at most {limit}; ask for a shorter context, or take "
            "another model"
        )


@torch.no_grad()
def full_logits(model: "PreTrainedModel", sample: Sample) -> Tensor:
    """What full attention predicts for each token of the continuation, in one forward pass: [n, vocabulary].

    Raises ConfigError for a sample that is longer than the model can read.
    """
    check_length(model.config, sample.num_tokens, "the sample")
    places, start = [], 0
    for turn in sample.turns:
        first = start + len(turn.prompt_ids) - 1
        places.append(torch.arange(first, first + len(turn.continuation_ids)))
        start += turn.num_tokens
    wanted = torch.cat(places).to(model.device)
    return _call(model, sample.ids.to(model.device), use_cache=False, keep=wanted)


@torch.no_grad()
def run_forced(
    model: "PreTrainedModel",
    policy: Policy,
    sample: Sample,
    *,
    execution: Execution = "offload",
    capture: bool | None = None,
    observer: Observer | None = None,
    registry: "Registry | None" = None,
) -> ForcedRun:
    """Read the prompt, then decode the continuation token by token under a policy.

    execution, capture, registry: as in `kvframe.attach`.
    observer: sees the cache after each decode step.

    Raises ConfigError for a sample that is longer than the model can read, and whatever `attach` raises.
    """
    from kvframe.hf import attach

    check_length(model.config, sample.num_tokens, "the sample")
    ids = sample.ids.to(model.device)
    clock = _Clock(device=model.device)
    logits: list[Tensor] = []
    with attach(model, policy, execution=execution, capture=capture, registry=registry) as run:
        cache = run.new_cache(max_length=sample.num_tokens)
        start = read = 0
        for turn in sample.turns:
            first, last = start + len(turn.prompt_ids) - 1, start + turn.num_tokens - 1
            cache.prompt_end = first
            with clock.prefill():
                # With it comes the last token of the turn before, which nothing has followed yet.
                _call(model, ids[:, read:first], past_key_values=cache, use_cache=True, keep=1)
            with clock.decode():
                for place in range(first, last):
                    step = _call(model, ids[:, place : place + 1], past_key_values=cache, use_cache=True)
                    logits.append(step[0])
                    if observer is not None:
                        observer(cache, len(logits) - 1)
            start, read = start + turn.num_tokens, last
        cache.prompt_end = None
        cache.check_finite()
    return ForcedRun(
        logits=torch.stack(logits),
        cache=cache,
        prefill_seconds=clock.prefill_seconds,
        decode_seconds=clock.decode_seconds,
        peak_memory=clock.peak_memory(),
    )


def _call(model: "PreTrainedModel", ids: Tensor, *, keep: Tensor | int | None = None, **arguments: Any) -> Tensor:
    """Logits [n, vocabulary] of one sequence; keep: the places to predict from, or how many of the last."""
    caller: Any = model
    if keep is not None and "logits_to_keep" in signature(model.forward).parameters:
        arguments, keep = {**arguments, "logits_to_keep": keep}, None
    logits: Tensor = caller(input_ids=ids, **arguments).logits[0]
    return logits if keep is None else logits[-keep:] if isinstance(keep, int) else logits[keep]


@define
class _Clock:
    """Times reading and decoding apart, and knows the most memory that was allocated meanwhile."""

    device: torch.device
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def __attrs_post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def prefill(self) -> Iterator[None]:
        start = self._now()
        yield
        self.prefill_seconds += self._now() - start

    @contextmanager
    def decode(self) -> Iterator[None]:
        start = self._now()
        yield
        self.decode_seconds += self._now() - start

    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()
