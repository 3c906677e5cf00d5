"""`kvframe eval`: lm-eval's tasks, or a file of samples, under a policy."""

import importlib.util
import json as json_module
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from kvframe.cli.console import check_choice, out, print_json
from kvframe.cli.evaluate_dataset import DATASET_SET, evaluate_dataset, make_dataset
from kvframe.cli.generate import DTYPE, MODEL
from kvframe.cli.listing import JSON
from kvframe.cli.models import DTYPES
from kvframe.cli.show import POLICY, SET
from kvframe.errors import ConfigError

if TYPE_CHECKING:
    from kvframe.composition import Policy
    from kvframe.eval.tasks.dataset import Dataset


def evaluate(
    model: MODEL,
    tasks: Annotated[str | None, typer.Option(help="Names of lm-eval's tasks, separated by commas.")] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Samples of LongBench, RULER, InfiniteBench or your own, without lm-eval."),
    ] = None,
    dataset_set: DATASET_SET = None,
    context: Annotated[
        int | None,
        typer.Option(min=3, help="With --dataset: tokens of a sample at most; the model's limit without."),
    ] = None,
    policy: POLICY = "louiskv",
    set_: SET = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Task files of your own; then lm-eval's own are not looked at.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of each task at most.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in front of each question.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences generated at the same time.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Put questions into the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Draws the examples, and seeds sampling.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all of lm-eval's results as JSON.")] = None,
    dtype: DTYPE = "auto",
    json: JSON = False,
) -> None:
    """Run tasks of lm-eval, or the samples of a file, with a model that decodes under a policy."""
    from kvframe.options import parse_options
    from kvframe.registry import default_registry

    check_choice("--dtype", dtype, DTYPES)
    if (tasks is None) == (dataset is None):
        raise ConfigError("expected one of --tasks, names of lm-eval's tasks, and --dataset, a file of samples")
    if tasks is not None and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("`kvframe eval` needs lm-eval; pip install 'kvframe[lm-eval]'")
    record = default_registry().policy_spec(policy)
    made = record.make(**parse_options(record.config_cls, set_ or []))
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path must be a directory with task files; there is none at {include_path}")
    if output is not None and not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no directory {output.absolute().parent}; make it first")

    if dataset is not None:
        _dataset(model, dtype, made, make_dataset(dataset, dataset_set or []), context, limit, output, json)
        return
    assert tasks is not None

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from kvframe.cli.models import load
    from kvframe.eval.harness import PolicyLM

    manager = TaskManager(
        include_path=None if include_path is None else str(include_path), include_defaults=include_path is None
    )
    names = _names(tasks, manager)
    loaded, tokenizer = load(model, dtype, quiet=json)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its remarks are about how it was called
    found = simple_evaluate(
        model=PolicyLM(loaded, made, tokenizer=tokenizer, batch_size=batch_size),
        tasks=names,
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=chat,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    result = {
        "model": model,
        "policy": made.to_dict(),
        "results": found["results"],
        "samples": found["n-samples"],
    }
    if output is not None:
        _write(found, output)
    if json:
        print_json(json_module.loads(json_module.dumps(result, default=str)))
    else:
        _show(found["results"])


def _dataset(
    model: str,
    dtype: str,
    policy: "Policy",
    dataset: "Dataset",
    context: int | None,
    limit: int | None,
    output: Path | None,
    json: bool,
) -> None:
    from kvframe.cli.models import load

    loaded, tokenizer = load(model, dtype, quiet=json)
    found = evaluate_dataset(loaded, tokenizer, policy, dataset, context=context, limit=limit, quiet=json)
    found = {"model": model, "policy": policy.to_dict(), "dataset": dataset.to_dict()} | found
    if output is not None:
        _write(found, output)
    if json:
        print_json(found)
    else:
        _show(found["results"])


def _names(tasks: str, manager: Any) -> list[str]:
    """The tasks that were asked for. Raises ConfigError for one that there is not."""
    from kvframe.suggest import hint

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names none; expected names of lm-eval's tasks, separated by commas")
    for name in names:
        if not manager.match_tasks([name]):
            known = sorted(manager.all_tasks)
            raise ConfigError(f"lm-eval has no task {name!r}{hint(name, known) if len(known) < 50 else ''}")
    return names


def _write(found: dict[str, Any], output: Path) -> None:
    try:
        output.write_text(json_module.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {output}: {error}") from error


def _show(results: dict[str, dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for head in ("task", "metric", "filter"):
        table.add_column(head)
    for head in ("value", "± error"):
        table.add_column(head, justify="right")
    for task, figures in results.items():
        for name, value in figures.items():
            metric, _, rule = name.partition(",")
            if metric.endswith("_stderr") or metric == "sample_len" or isinstance(value, str):
                continue
            error = figures.get(f"{metric}_stderr,{rule}")
            spread = f"{error:.4f}" if isinstance(error, float) else ""
            table.add_row(task, metric, rule, f"{value:.4f}", spread)
    out().print(table)
