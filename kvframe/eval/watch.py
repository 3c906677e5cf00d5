"""One generation looked at step by step: where the trigger fired, what was fetched, what was held."""

import functools
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.eval.forced import check_length, run_forced
from kvframe.eval.tasks import Sample, Task, Turn
from kvframe.eval.text import haystack as read_haystack
from kvframe.memory.dense import ShadowMemory
from kvframe.runtime import RetrievalLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvframe.hf.cache import RetrievalCache

_PLACES = 64
"""Parts of equal length that the text is cut into, to say from where something was fetched."""
_EXCERPT = 160
"""Characters of each part that are kept."""


def watch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    policy: Policy,
    task: Task,
    *,
    context: int,
    seed: int,
    haystack: str | None = None,
    num_tokens: int,
) -> dict[str, Any]:
    """What a policy does at each step of a generation that full attention drives, as plain data.

    The model reads the first turn of a task's sample and goes on greedily for `num_tokens` tokens. Then the policy is
    watched over that text in `shadow` execution, so that the text is the same for every policy.

    Raises ConfigError for a prompt that the model cannot read.
    """
    sample = task.make(tokenizer, context, seed, read_haystack(haystack))
    prompt = sample.turns[0].prompt_ids
    check_length(model.config, len(prompt) + num_tokens, f"task {task.name} with {num_tokens} generated tokens")
    generated = _generated(model, tuple(prompt.tolist()), num_tokens)
    text = Sample(turns=(Turn(prompt_ids=prompt, continuation_ids=generated),))
    eye = _Eye(num_rows=text.num_tokens)
    run = run_forced(model, policy, text, execution="shadow", observer=eye)
    report = run.report()
    ids = text.ids[0]
    edges = [round(place * len(ids) / _PLACES) for place in range(_PLACES + 1)]
    return {
        "tokens": [str(tokenizer.decode([token])) for token in generated.tolist()],
        "prompt_tokens": len(prompt),
        "places": [str(tokenizer.decode(ids[start:stop]))[:_EXCERPT] for start, stop in pairwise(edges)],
        "fires": eye.stacked("fires"),
        "fetched_rows": eye.stacked("fetched_rows"),
        "held_mass": eye.stacked("held_mass"),
        "fetched_from": eye.fetched_from,
        "layers": [
            {
                "layer": layer.layer_idx,
                "captured_mass": layer.captured_mass,
                "oracle_recall": layer.oracle_recall,
                "retrieval_rate": layer.retrieval_rate,
                "attended": layer.attended_sinks + layer.attended_retrieved + layer.attended_window,
            }
            for layer in report.layers
        ],
        "prompt_unit_sizes": report.prompt_unit_sizes,
        "segment_lengths": report.segment_lengths,
        "retrieval_rate": report.retrieval_rate,
        "captured_mass": report.captured_mass,
        "attended_total": report.attended_total,
    }


@functools.lru_cache(maxsize=1)
def _generated(model: Any, prompt: tuple[int, ...], num_tokens: int) -> Tensor:
    """int64 [num_tokens], greedily; kept, because it is the same for every policy."""
    ids = torch.tensor([prompt], device=model.device)
    if num_tokens < 1:
        raise ConfigError(f"expected at least one token to generate, got {num_tokens}")
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
        )
    found: Tensor = output[0, len(prompt) :].cpu()
    return found


class _Eye:
    """Looks at a cache after every step, and keeps the differences."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._before: dict[str, list[float]] = {}
        self._resident: list[Tensor] | None = None
        self._steps: dict[str, list[list[float]]] = {"fires": [], "fetched_rows": [], "held_mass": []}
        self.fetched_from: list[list[int]] = []
        """For every step, rows fetched from each part of the text, over all layers and KV heads."""

    def __call__(self, cache: "RetrievalCache", step: int) -> None:
        layers = [layer.runtime for layer in cache.managed_layers if isinstance(layer.runtime, RetrievalLayer)]
        self._note("fires", [float(layer.stats.selections.double().mean()) for layer in layers])
        self._note("fetched_rows", [float(layer.stats.rows_recalled.sum()) for layer in layers])
        self._note("held_mass", [_mass(layer) for layer in layers])
        self.fetched_from.append(self._look(layers))

    def _note(self, what: str, totals: list[float]) -> None:
        before = self._before.get(what, [0.0] * len(totals))
        self._steps[what].append([round(total - was, 6) for total, was in zip(totals, before, strict=True)])
        self._before[what] = totals

    def _look(self, layers: list[RetrievalLayer]) -> list[int]:
        """Rows that are resident now and were not one step ago, by the part of the text they come from."""
        counts = torch.zeros(_PLACES, dtype=torch.int64)
        resident = [layer.memory.resident.clone() for layer in layers if isinstance(layer.memory, ShadowMemory)]
        before = self._resident or [torch.zeros_like(mask) for mask in resident]
        for layer, now, was in zip(layers, resident, before, strict=True):
            for head, fresh in enumerate((now & ~was)[0]):
                positions = layer.positions.of(0, layer.capacity)[head][fresh[: layer.capacity].nonzero()[:, 0].cpu()]
                places = positions.long() * _PLACES // self._num_rows
                counts += torch.bincount(places.clamp(0, _PLACES - 1).cpu(), minlength=_PLACES)
        self._resident = resident
        return [int(count) for count in counts]

    def stacked(self, what: str) -> list[list[float]]:
        """[layers][steps]."""
        return [list(steps) for steps in zip(*self._steps[what], strict=True)]


def _mass(layer: RetrievalLayer) -> float:
    """Sum over steps of the share of the full softmax that is held, mean over heads."""
    assert isinstance(layer.memory, ShadowMemory)
    return float(layer.memory.captured_mass.mean())
