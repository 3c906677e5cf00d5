"""`kvframe eval --dataset`: the samples of a local file under a policy, one after the other."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvframe.cli.console import progress
from kvframe.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvframe.composition import Policy
    from kvframe.eval.tasks.dataset import Dataset

DATASET_SET = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset-set", metavar="KEY=VALUE", help="An option of the task `dataset`; may be given several times."
    ),
]
METRICS = ("generated_score", "score", "score_full", "kl", "attended_total", "retrieval_rate")
"""What is measured of every sample."""


def make_dataset(path: Path, options: Sequence[str]) -> "Dataset":
    """The task that reads a file. Raises ConfigError for a file or an option that does not fit."""
    from kvframe.eval.tasks.dataset import Dataset
    from kvframe.options import configure, parse_options

    made = configure(Dataset, {"path": str(path)} | parse_options(Dataset, options))
    made.records()  # whatever is wrong with it shows before a model is loaded
    return made


def evaluate_dataset(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    policy: "Policy",
    dataset: "Dataset",
    *,
    context: int | None,
    limit: int | None,
    quiet: bool,
) -> dict[str, Any]:
    """Mean and standard error of every figure over the samples, as lm-eval names them, and how many there were.

    context: tokens of a sample at most; as many as the model reads without.
    limit: the first so many samples; all without.

    Raises ConfigError for a sample that is longer and may not be cut, and where the model does not say what it reads.
    """
    from kvframe.eval.forced import context_limit
    from kvframe.eval.runner import evaluate

    _, records = dataset.records()
    count = min(len(records), limit or len(records))
    context = context or context_limit(model.config)
    if context is None:
        raise ConfigError("the model's config does not say how many tokens it reads; set --context")
    found = []
    with progress(f"{count} samples", quiet=quiet) as bar:
        for number in range(count):
            found.append(evaluate(model, tokenizer, policy, dataset, context=context, seed=number, metrics=METRICS))
            bar.update(number + 1, count)
    figures: dict[str, Any] = {}
    for name in METRICS:
        values = [each[name] for each in found]
        figures[f"{name},none"] = fmean(values)
        figures[f"{name}_stderr,none"] = stdev(values) / count**0.5 if count > 1 else None
    return {"results": {Path(dataset.path).stem: figures}, "samples": count, "per_sample": found}
