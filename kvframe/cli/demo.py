"""`kvframe demo`: the main job on a small real model."""

from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from kvframe.cli.console import check_choice, errors, out, print_json, waiting
from kvframe.cli.generate import DTYPE
from kvframe.cli.listing import JSON
from kvframe.cli.models import DTYPES, load
from kvframe.cli.show import POLICY, SET
from kvframe.types import Execution

if TYPE_CHECKING:
    from pathlib import Path

    from kvframe.composition import Policy
    from kvframe.demo import DemoPrompt

_MAX_NEW_TOKENS = 32


def demo(
    download_only: Annotated[bool, typer.Option("--download-only", help="Fetch the model and stop.")] = False,
    policy: POLICY = "louiskv-long-input",
    token_budget: Annotated[int, typer.Option(min=1, help="Retrieved tokens, where the policy has a budget.")] = 512,
    set_: SET = None,
    execution: Annotated[str, typer.Option(help="offload, dense or shadow.")] = "offload",
    prompt_tokens: Annotated[int, typer.Option(min=256, help="Tokens of prose in the prompt, at least.")] = 4000,
    seed: Annotated[int, typer.Option(help="Orders the prose and draws the fact.")] = 0,
    dtype: DTYPE = "float32",
    json: JSON = False,
) -> None:
    """Ask SmolLM2 for a fact placed early in a prompt of 4,000 tokens, its KV cache in host memory.

    Exit code 1 if the answer does not contain the fact.
    """
    check_choice("--execution", execution, get_args(Execution))
    check_choice("--dtype", dtype, DTYPES)
    made = _make_policy(policy, token_budget, set_ or [])
    folder = _fetch(quiet=json)
    if download_only:
        if json:
            print_json({"model": str(folder)})
        return

    from kvframe.cli.running import generate_text
    from kvframe.demo import build_prompt

    model, tokenizer = load(str(folder), dtype, quiet=json)
    prompt = build_prompt(tokenizer, num_tokens=prompt_tokens, seed=seed)
    if not json:
        dtype_name = str(model.dtype).removeprefix("torch.")
        errors.print(f"model: {folder.name}, {dtype_name} on {model.device}", markup=False, soft_wrap=True)
        errors.print(_describe(prompt, made), markup=False, soft_wrap=True)
    generated = generate_text(
        model,
        tokenizer,
        prompt.input_ids,
        made,
        execution=execution,  # type: ignore[arg-type]  # checked above
        quiet=json,
        max_new_tokens=_MAX_NEW_TOKENS,
        do_sample=False,
    )
    found = prompt.is_answered_by(generated.text)
    if json:
        place = {"fact_start": prompt.fact_start, "fact_end": prompt.fact_end}
        asked = {"question": prompt.question, "answer": prompt.answer, "found": found, **place}
        print_json({"model": str(folder)} | asked | generated.to_dict())
    else:
        verdict = "The fact came back" if found else "The fact did NOT come back"
        out().print(f"\n{verdict}: the animal is the {prompt.answer}.", markup=False)
        out().rule()
        out().print(str(generated.report), markup=False)
    if not found:
        raise typer.Exit(1)


def _make_policy(name: str, token_budget: int, assignments: list[str]) -> "Policy":
    from kvframe.options import option_names, parse_options
    from kvframe.registry import default_registry

    record = default_registry().policy_spec(name)
    options: dict[str, Any] = parse_options(record.config_cls, assignments)
    if "token_budget" in option_names(record.config_cls):
        options.setdefault("token_budget", token_budget)
    return record.make(**options)


def _fetch(*, quiet: bool) -> "Path":
    from kvframe.models import fetch_smollm2

    def say(message: str) -> None:
        if not quiet:
            errors.print(message, markup=False)

    with waiting("fetching the model", quiet=quiet):
        return fetch_smollm2(progress=say)


def _describe(prompt: "DemoPrompt", policy: "Policy") -> str:
    """What is asked, and whether the fact lies where a step attends anyway."""
    sinks, recent = policy.sink_size, prompt.num_tokens - policy.window_size
    place = "outside of sinks and window, so it has to be retrieved"
    if policy.dense_layers == "all":
        place = "attended in any case, as all layers are dense"
    elif prompt.fact_start < sinks or prompt.fact_end > recent:
        place = "attended in any case, as sinks or window reach it"
    return (
        f"policy: {policy.name}: {sinks} sinks + {policy.selector.capacity} retrieved + {policy.window_size} recent "
        f"tokens; dense layers {policy.dense_layers or 'none'}\n"
        f"prompt: {prompt.num_tokens:,} tokens of prose with a fact at tokens {prompt.fact_start:,} to "
        f"{prompt.fact_end:,}, {place}\n"
        f"fact: {prompt.fact}\n"
        f"question: {prompt.question}\n"
    )
