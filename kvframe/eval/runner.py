"""One cell of a study: a policy on one sample of a task."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvframe.composition import Policy
from kvframe.eval.fidelity import compare_logits
from kvframe.eval.forced import check_length, run_forced
from kvframe.eval.metrics import DEFAULT_METRICS, METRICS, Evidence, check_metrics
from kvframe.eval.remembered import remembered_logits
from kvframe.eval.tasks import Sample, Task
from kvframe.eval.text import Haystack
from kvframe.eval.text import haystack as read_haystack
from kvframe.types import Execution

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvframe.registry import Registry


def evaluate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    policy: Policy,
    task: Task,
    *,
    context: int,
    seed: int = 0,
    haystack: Haystack | str | Path | None = None,
    metrics: Sequence[str] | None = None,
    execution: Execution = "offload",
    registry: "Registry | None" = None,
) -> dict[str, Any]:
    """Figures of a policy on one sample, by the names of `METRICS`: plain data, ready for JSON.

    context: tokens of the whole sample, prompt and continuation.
    seed, haystack: what the sample is made from; the standard library's documentation without a haystack.
    metrics: the figures wanted, `DEFAULT_METRICS` without. Only the runs that they need are made: one under the policy
        beside full attention, one in `shadow` execution, one that generates freely.
    execution: of the run under the policy, as in `kvframe.attach`.

    On one machine the same arguments give the same figures, timings aside. Raises UnknownNameError for a metric that
    there is not, ConfigError for a context that the model cannot read or the task does not fit, before anything runs.
    """
    names = DEFAULT_METRICS if metrics is None else tuple(metrics)
    check_metrics(names)
    check_length(model.config, context, f"task {task.name}")
    stack = haystack if isinstance(haystack, Haystack) else read_haystack(haystack)
    sample, policy = task.make(tokenizer, context, seed, stack), policy.fitted(tokenizer)
    needs = {METRICS[name].needs for name in names}
    forced = fidelity = shadow = generated = None
    if "forced" in needs:
        full = remembered_logits.of(model, sample)
        forced = run_forced(model, policy, sample, execution=execution, registry=registry)
        fidelity = compare_logits(full, forced.logits, sample.targets)
    if "shadow" in needs:
        shadow = run_forced(model, policy, sample, execution="shadow", registry=registry)
    if "generated" in needs:
        generated = _generate(model, tokenizer, policy, sample, execution, registry)
    evidence = Evidence(sample=sample, forced=forced, fidelity=fidelity, shadow=shadow, generated=generated)
    return {name: METRICS[name].read(evidence) for name in names}


def _generate(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    policy: Policy,
    sample: Sample,
    execution: Execution,
    registry: "Registry | None",
) -> str:
    """What the model says, greedily, after the first turn's prompt."""
    from kvframe.hf import attach

    prompt = sample.turns[0].prompt_ids[None].to(model.device)
    generator: Any = model
    with attach(model, policy, execution=execution, registry=registry):
        sequences = generator.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max(1, sample.max_new_tokens),
            do_sample=False,
        )
    return str(tokenizer.decode(sequences[0, prompt.shape[1] :], skip_special_tokens=True))
