"""Many policies beside each other at equal totals: how far each is from full attention, at several budgets.

Two tasks: needles in prose, and a verbatim copy. Each with every policy selecting anew at every step, which compares
what is selected; with each policy's own trigger, which adds when; and with that trigger calibrated to a wanted rate.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import frozen

from kvframe.calibration import Calibration
from kvframe.composition import Policy
from kvframe.errors import ConfigError, KvframeError
from kvframe.eval.fidelity import compare_logits, in_answers, passed
from kvframe.eval.forced import check_length, full_logits, run_forced
from kvframe.eval.running import task_titles
from kvframe.eval.tasks import Sample, Task
from kvframe.eval.text import Haystack
from kvframe.options import option_names
from kvframe.registry import Registry, default_registry
from kvframe.stages import EveryStep, Never, QuantizedHostPool

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POLICIES = (
    "oracle_topk",
    "louiskv",
    "clusterkv",
    "retroinfer",
    "quest",
    "arkvale",
    "h2o",
    "snapkv",
    "window",
)
"""What is compared if nobody says otherwise, of these what is installed."""

TriggerMode = Literal["every-step", "own", "calibrated"]


@frozen(kw_only=True)
class Setting:
    """What all policies share."""

    budgets: tuple[int, ...] = (128, 256, 512, 1024)
    """Retrieved tokens of a head; sinks and window come on top."""
    sink_size: int = 32
    window_size: int = 128
    dense_layers: tuple[int, ...] = (0, 1)
    triggers: tuple[TriggerMode, ...] = ("every-step", "own")
    calibration: Calibration | None = None
    """Thresholds for this model, which the trigger "calibrated" needs."""

    def __attrs_post_init__(self) -> None:
        if "calibrated" in self.triggers and self.calibration is None:
            raise ConfigError(
                "the trigger 'calibrated' needs a calibration; make one with `kvframe calibrate MODEL --output FILE` "
                "and pass it as --calibration FILE"
            )


@frozen(kw_only=True)
class Row:
    """The figures of one policy on one task; the means run over steps."""

    task: str = ""
    policy: str = ""
    token_budget: int = 0
    trigger: TriggerMode = "own"
    kl: float | None = None
    """KL(full attention || policy) over the tokens of the answers, in nats."""
    kl_all: float | None = None
    """The same over every token of the continuation."""
    top1_agreement: float | None = None
    """Share of the answers' tokens for which both predict the same token."""
    score: float | None = None
    """Share of answers that are right."""
    score_full: float | None = None
    """The same under full attention."""
    retrieval_rate: float | None = None
    """Share of steps and heads that selected anew."""
    attended_total: float | None = None
    """Tokens that a head attended to."""
    bytes_per_token: float | None = None
    """Bytes from host to device a step."""
    wanted_rate: float | None = None
    """What the trigger was calibrated to, where it was."""
    num_steps: int = 0
    refused: str | None = None
    """Why there are no figures."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return attrs.asdict(self)


def installed(names: Sequence[str], registry: Registry | None = None) -> tuple[list[str], list[str]]:
    """Of these names of policies, those that there are, and those that there are not."""
    known = [record.name for record in (registry or default_registry()).policies()]
    there = [name for name in names if _quantised(name)[0] in known]
    return there, [name for name in names if name not in there]


def _quantised(name: str) -> tuple[str, int | None]:
    """ "quest+4bit" is quest with its KV on the host in four bits."""
    base, plus, width = name.partition("+")
    if not plus:
        return name, None
    if width not in ("2bit", "4bit", "8bit"):
        raise ConfigError(f"{name!r}: expected the name of a policy, or one with +2bit, +4bit or +8bit behind it")
    return base, int(width.removesuffix("bit"))


def contender(
    name: str, token_budget: int, trigger: TriggerMode, setting: Setting, registry: Registry | None = None
) -> Policy:
    """A policy with the setting's sizes and so many retrieved tokens.

    A policy without a budget gets it as recent tokens, so that the totals are equal. With +4bit (or 2, or 8) behind its
    name it has `QuantizedHostPool` in its transfer slot. A calibrated trigger is one that takes the setting's
    thresholds; a policy without such a trigger keeps its own.

    Raises UnknownNameError for a name that is none, ConfigError for sizes that do not fit.
    """
    base, bits = _quantised(name)
    record = (registry or default_registry()).policy_spec(base)
    known = option_names(record.config_cls)
    has_budget = "token_budget" in known
    sizes = {
        "token_budget": token_budget,
        "sink_size": setting.sink_size,
        "window_size": setting.window_size + (0 if has_budget else token_budget),
        "dense_layers": setting.dense_layers,
    }
    if trigger == "calibrated" and setting.calibration is not None and setting.calibration.options.keys() <= set(known):
        sizes |= setting.calibration.options
    policy = record.make(**{key: value for key, value in sizes.items() if key in known})
    if trigger == "every-step" and policy.selector.capacity and not isinstance(policy.trigger, Never):
        policy = policy.swap(trigger=EveryStep())
    if bits is not None:
        policy = policy.swap(transfer=QuantizedHostPool(bits=bits))  # type: ignore[arg-type]  # checked above
    return policy


def compare(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    tasks: Sequence[Task],
    policies: Sequence[str],
    setting: Setting,
    context: int,
    seed: int,
    haystack: Haystack,
    registry: Registry | None = None,
) -> Iterator[Row]:
    """Figures of every policy at every budget, each as soon as it is there; a policy that cannot run has its reason.

    context: tokens of the whole text of a task, prompt and continuation.

    Raises UnknownNameError for a policy that there is not, ConfigError for a task that does not fit the context or the
    model, before anything runs.
    """
    check_length(model.config, context, "the context")
    for name in policies:
        (registry or default_registry()).policy_spec(_quantised(name)[0])
    made = [task.make(tokenizer, context, seed, haystack) for task in tasks]
    samples = list(zip(task_titles(tasks), made, strict=True))
    return _rows(model, tokenizer, samples, policies, setting, registry)


def _rows(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    samples: Sequence[tuple[str, Sample]],
    policies: Sequence[str],
    setting: Setting,
    registry: Registry | None,
) -> Iterator[Row]:
    for title, sample in samples:
        full = full_logits(model, sample)
        done: dict[Policy, Row] = {}
        for trigger, token_budget, name in product(setting.triggers, setting.budgets, policies):
            place: dict[str, Any] = {"task": title, "trigger": trigger, "token_budget": token_budget}
            if trigger == "calibrated" and setting.calibration is not None:
                place["wanted_rate"] = setting.calibration.retrieval_rate
            try:
                policy = contender(name, token_budget, trigger, setting, registry).fitted(tokenizer)
                if policy not in done:
                    done[policy] = _figures(model, policy, sample, full, registry)
                yield attrs.evolve(done[policy], **place, policy=name)
            except KvframeError as error:
                yield Row(**place, policy=name, refused=str(error))


def _figures(
    model: "PreTrainedModel", policy: Policy, sample: Sample, full: "Tensor", registry: Registry | None
) -> Row:
    run = run_forced(model, policy, sample, registry=registry)
    report, fidelity = run.report(), compare_logits(full, run.logits, sample.targets)
    answers = in_answers(sample.num_steps, sample.answers)
    return Row(
        kl=float(fidelity.kl[answers].mean()),
        kl_all=float(fidelity.kl.mean()),
        top1_agreement=float(fidelity.agrees[answers].double().mean()),
        score=_share(passed(fidelity.correct, sample.answers)),
        score_full=_share(passed(fidelity.correct_full, sample.answers)),
        retrieval_rate=report.retrieval_rate,
        attended_total=report.attended_total,
        bytes_per_token=report.bytes_to_device_per_step,
        num_steps=sample.num_steps,
    )


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)
