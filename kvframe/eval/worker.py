"""One cell, wherever it runs: load the model, once in a process, evaluate, and never raise."""

import functools
import traceback
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from kvframe.eval.environment import describe_environment
from kvframe.eval.outcome import Outcome
from kvframe.eval.study import Cell

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_cell(cell: Cell) -> Outcome:
    """A cell's figures, or the traceback of what it raised."""
    since = perf_counter()
    try:
        figures = _figures(cell)
    except Exception as error:
        return Outcome(
            key=cell.key,
            error=explain(error),
            seconds=perf_counter() - since,
            environment=describe_environment(),
        )
    return Outcome(key=cell.key, figures=figures, seconds=perf_counter() - since, environment=describe_environment())


def explain(error: BaseException) -> str:
    """A traceback as text."""
    return "".join(traceback.format_exception(error)).rstrip()


def _figures(cell: Cell) -> dict[str, Any]:
    model, tokenizer = load_model(cell.model, cell.dtype)
    torch.manual_seed(cell.seed)
    if cell.kind == "watch":
        from kvframe.eval.watch import watch

        return watch(
            model,
            tokenizer,
            cell.policy,
            cell.task,
            context=cell.context,
            seed=cell.seed,
            haystack=cell.haystack,
            num_tokens=cell.watch,
        )
    from kvframe.eval.runner import evaluate

    return evaluate(
        model,
        tokenizer,
        cell.policy,
        cell.task,
        context=cell.context,
        seed=cell.seed,
        haystack=cell.haystack,
        metrics=cell.metrics,
    )


@functools.lru_cache(maxsize=1)
def load_model(name: str, dtype: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model of a study and its tokenizer, kept for the next cell of this process."""
    from kvframe.cli.models import load

    return load(name, dtype, quiet=True)
