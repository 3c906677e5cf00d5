"""One cell, wherever it runs: load the model, once in a process, evaluate, and never raise."""

import functools
import sys
import traceback
from pathlib import Path
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
    """A traceback as text, files named as Python finds them: where they lie on this machine is nobody's business."""
    found = traceback.TracebackException.from_exception(error)
    waiting: list[traceback.TracebackException | None] = [found]
    while waiting:
        part = waiting.pop()
        if part is not None:
            for frame in part.stack:
                frame.filename = _short(frame.filename)
            waiting += [part.__cause__, part.__context__]
    return "".join(found.format()).rstrip()


def _short(file: str) -> str:
    roots = [str(Path(entry).absolute()) for entry in sys.path if entry]
    inside = [root for root in roots if file.startswith(root + "/")]
    return file[len(max(inside, key=len)) + 1 :] if inside else Path(file).name


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
