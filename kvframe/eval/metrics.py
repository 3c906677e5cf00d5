"""Figures of one sample under one policy, each by its name."""

import functools
import math
from collections.abc import Callable, Iterable
from statistics import fmean
from typing import Any, Literal, TypeVar

from attrs import frozen
from torch import Tensor

from kvframe.errors import UnknownNameError
from kvframe.eval.fidelity import Fidelity, in_answers, passed
from kvframe.eval.footprint import Footprint, footprint
from kvframe.eval.forced import ForcedRun
from kvframe.eval.tasks import Sample
from kvframe.memory.dense import ShadowMemory
from kvframe.report import Report
from kvframe.runtime import RetrievalLayer
from kvframe.suggest import hint

Need = Literal["forced", "shadow", "generated"]
"""The run that a figure is read from: one that is made to say the continuation, one in which full attention drives and
the policy is watched, or a free generation."""


@frozen(kw_only=True, eq=False, slots=False)
class Evidence:
    """What was observed of one sample; runs that no figure needs are not there."""

    sample: Sample
    forced: ForcedRun | None = None
    fidelity: Fidelity | None = None
    """Of `forced`."""
    shadow: ForcedRun | None = None
    generated: str | None = None

    @functools.cached_property
    def report(self) -> Report:
        """Of the run in which the policy drives."""
        return _there(self.forced).report()

    @functools.cached_property
    def answer_tokens(self) -> Tensor:
        """bool [n]: the tokens of the answers; all tokens where a task has no answers."""
        inside = in_answers(self.sample.num_steps, self.sample.answers)
        return inside if bool(inside.any()) else ~inside

    def footprint(self, *, decode_only: bool) -> Footprint:
        """Of the run in which the policy drives."""
        num_steps = self.sample.num_steps
        num_prompt = self.sample.num_tokens - num_steps - 1
        return footprint(_there(self.forced), num_prompt, num_steps, decode_only=decode_only)


@frozen(kw_only=True, eq=False)
class Metric:
    """A figure that `evaluate` gives."""

    name: str
    summary: str
    needs: Need
    is_timing: bool
    """Whether it differs from run to run; all others repeat exactly on one machine."""
    read: Callable[[Evidence], Any]


METRICS: dict[str, Metric] = {}
"""Every figure by its name."""

_Read = Callable[[Evidence], Any]
_T = TypeVar("_T")


def _metric(needs: Need, *, is_timing: bool = False) -> Callable[[_Read], _Read]:
    """Make a function a metric: its name is the figure's, its docstring says what that is."""

    def register(read: _Read) -> _Read:
        summary = " ".join((read.__doc__ or "").split())
        METRICS[read.__name__] = Metric(
            name=read.__name__, summary=summary, needs=needs, is_timing=is_timing, read=read
        )
        return read

    return register


def check_metrics(names: Iterable[str]) -> None:
    """Raise UnknownNameError for a name that is no metric."""
    for name in names:
        if name not in METRICS:
            raise UnknownNameError(f"there is no metric {name!r}{hint(name, METRICS)}")


def _there(found: _T | None) -> _T:
    assert found is not None, "a metric reads what it does not say that it needs"
    return found


# ---- fidelity -------------------------------------------------------------------------------------------------------


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _score(correct: Tensor, sample: Sample) -> float | None:
    return fmean(passed(correct, sample.answers)) if sample.answers else None


@_metric("forced")
def score(evidence: Evidence) -> float | None:
    """Share of answers of which every token is the likeliest one; none for a task without answers."""
    return _score(_there(evidence.fidelity).correct, evidence.sample)


@_metric("forced")
def score_full(evidence: Evidence) -> float | None:
    """The score under full attention."""
    return _score(_there(evidence.fidelity).correct_full, evidence.sample)


@_metric("forced")
def num_answers(evidence: Evidence) -> int:
    """Answers that the scores are shares of."""
    return len(evidence.sample.answers)


@_metric("forced")
def kl(evidence: Evidence) -> float:
    """KL(full attention || policy) in nats, mean over the tokens of the answers; over all where there are none."""
    return _mean(_there(evidence.fidelity).kl[evidence.answer_tokens])


@_metric("forced")
def kl_all(evidence: Evidence) -> float:
    """The same, mean over every token of the continuation."""
    return _mean(_there(evidence.fidelity).kl)


@_metric("forced")
def top1_agreement(evidence: Evidence) -> float:
    """Share of the answers' tokens for which policy and full attention hold the same token for the likeliest."""
    return _mean(_there(evidence.fidelity).agrees[evidence.answer_tokens])


@_metric("forced")
def nll(evidence: Evidence) -> float:
    """-log probability of the answers' tokens under the policy, mean, in nats."""
    return _mean(_there(evidence.fidelity).nll[evidence.answer_tokens])


@_metric("forced")
def nll_full(evidence: Evidence) -> float:
    """The same under full attention."""
    return _mean(_there(evidence.fidelity).nll_full[evidence.answer_tokens])


@_metric("forced")
def nll_difference(evidence: Evidence) -> float:
    """What the policy adds to it."""
    fidelity, inside = _there(evidence.fidelity), evidence.answer_tokens
    return _mean((fidelity.nll - fidelity.nll_full)[inside])


@_metric("forced")
def perplexity(evidence: Evidence) -> float:
    """exp of the mean -log probability of every token of the continuation under the policy."""
    return math.exp(_mean(_there(evidence.fidelity).nll))


@_metric("forced")
def kl_by_token(evidence: Evidence) -> list[float]:
    """KL of every token of the continuation, one after the other."""
    return [float(value) for value in _there(evidence.fidelity).kl]


# ---- what was attended to, and what moved ---------------------------------------------------------------------------


@_metric("forced")
def attended_total(evidence: Evidence) -> float:
    """Tokens that a head attended to, mean over steps and retrieval layers."""
    return evidence.report.attended_total


@_metric("forced")
def attended_sinks(evidence: Evidence) -> float:
    """Of these, sinks."""
    return evidence.report.attended_sinks


@_metric("forced")
def attended_retrieved(evidence: Evidence) -> float:
    """Of these, retrieved tokens."""
    return evidence.report.attended_retrieved


@_metric("forced")
def attended_window(evidence: Evidence) -> float:
    """Of these, recent tokens."""
    return evidence.report.attended_window


@_metric("forced")
def retrieval_rate(evidence: Evidence) -> float:
    """Share of steps and heads that selected anew."""
    return evidence.report.retrieval_rate


@_metric("forced")
def retrieval_rate_by_layer(evidence: Evidence) -> dict[str, float]:
    """The same for every retrieval layer, by its number."""
    return {str(layer.layer_idx): layer.retrieval_rate for layer in evidence.report.layers}


@_metric("forced")
def hit_rate(evidence: Evidence) -> float | None:
    """Share of selected rows that were resident; none without a selection."""
    return evidence.report.hit_rate


@_metric("forced")
def bytes_per_token(evidence: Evidence) -> float:
    """Bytes from host to device a decode step."""
    return evidence.report.bytes_to_device_per_step


@_metric("forced")
def bytes_to_host(evidence: Evidence) -> int:
    """Bytes from device to host in the whole run."""
    return evidence.report.bytes_to_host


@_metric("forced")
def segment_lengths(evidence: Evidence) -> dict[str, int]:
    """Units of generated tokens by their size."""
    return {str(size): count for size, count in evidence.report.segment_lengths.items()}


@_metric("forced")
def prompt_unit_sizes(evidence: Evidence) -> dict[str, int]:
    """Units of the prompt by their size."""
    return {str(size): count for size, count in evidence.report.prompt_unit_sizes.items()}


# ---- footprint ------------------------------------------------------------------------------------------------------


@_metric("forced")
def kv_footprint(evidence: Evidence) -> float:
    """Entries kept anywhere, as a share of full attention's over all tokens."""
    return evidence.footprint(decode_only=False).stored


@_metric("forced")
def kv_footprint_decode(evidence: Evidence) -> float:
    """The same over decode steps alone."""
    return evidence.footprint(decode_only=True).stored


@_metric("forced")
def kv_footprint_gpu(evidence: Evidence) -> float:
    """What the device holds for KV and for finding units, in entries, as that share."""
    return evidence.footprint(decode_only=False).on_device


@_metric("forced")
def kv_footprint_gpu_decode(evidence: Evidence) -> float:
    """The same over decode steps alone."""
    return evidence.footprint(decode_only=True).on_device


@_metric("forced")
def kv_active(evidence: Evidence) -> float:
    """Entries that attention reads, as that share."""
    return evidence.footprint(decode_only=False).attended


@_metric("forced")
def kv_active_decode(evidence: Evidence) -> float:
    """The same over decode steps alone."""
    return evidence.footprint(decode_only=True).attended


@_metric("forced")
def kv_peak_gpu(evidence: Evidence) -> float:
    """The most that the device holds at one time, as a share of the whole KV at the end."""
    return evidence.footprint(decode_only=False).peak_on_device


@_metric("forced")
def kv_peak_gpu_decode(evidence: Evidence) -> float:
    """The same over decode steps alone."""
    return evidence.footprint(decode_only=True).peak_on_device


# ---- time -----------------------------------------------------------------------------------------------------------


@_metric("forced", is_timing=True)
def tokens_per_second(evidence: Evidence) -> float:
    """Decode steps a second."""
    return evidence.sample.num_steps / _there(evidence.forced).decode_seconds


@_metric("forced", is_timing=True)
def prefill_seconds(evidence: Evidence) -> float:
    """Time to read the prompt."""
    return _there(evidence.forced).prefill_seconds


@_metric("forced", is_timing=True)
def peak_memory(evidence: Evidence) -> int | None:
    """Most bytes allocated on the CUDA device, the model's weights included; none without such a device."""
    return _there(evidence.forced).peak_memory


# ---- beside full attention, step by step ----------------------------------------------------------------------------


@_metric("shadow")
def captured_mass(evidence: Evidence) -> float | None:
    """Share of full attention's softmax that the attended tokens hold; none for a policy without retrieval layers."""
    return _there(evidence.shadow).report().captured_mass


@_metric("shadow")
def captured_mass_by_head(evidence: Evidence) -> dict[str, list[float]]:
    """The same for every KV head of every retrieval layer, by the layer's number."""
    return _by_head(evidence, lambda memory: memory.captured_mass)


@_metric("shadow")
def oracle_recall(evidence: Evidence) -> float | None:
    """Share of the best tokens, as many as are attended to, that are attended to."""
    return _there(evidence.shadow).report().oracle_recall


@_metric("shadow")
def oracle_recall_by_head(evidence: Evidence) -> dict[str, list[float]]:
    """The same for every KV head of every retrieval layer, by the layer's number."""
    return _by_head(evidence, lambda memory: memory.oracle_recall)


def _by_head(evidence: Evidence, read: Callable[[ShadowMemory], Tensor]) -> dict[str, list[float]]:
    found = {}
    for layer in _there(evidence.shadow).cache.managed_layers:
        runtime = layer.runtime
        if isinstance(runtime, RetrievalLayer) and isinstance(runtime.memory, ShadowMemory):
            means = read(runtime.memory)[0] / max(1, runtime.stats.num_steps)
            found[str(layer.layer_idx)] = [float(mean) for mean in means]
    return found


# ---- free generation ------------------------------------------------------------------------------------------------


@_metric("generated")
def generated_score(evidence: Evidence) -> float | None:
    """What the task's own scorer says of a text generated greedily under the policy; none where a task has none."""
    scorer = evidence.sample.scorer
    return None if scorer is None else scorer(_there(evidence.generated))


@_metric("generated")
def generated_text(evidence: Evidence) -> str:
    """That text."""
    return _there(evidence.generated)


DEFAULT_METRICS: tuple[str, ...] = (
    "score",
    "score_full",
    "num_answers",
    "kl",
    "kl_all",
    "top1_agreement",
    "nll_difference",
    "attended_total",
    "retrieval_rate",
    "hit_rate",
    "bytes_per_token",
    "kv_footprint",
    "kv_footprint_gpu",
    "kv_active",
    "kv_peak_gpu",
    "tokens_per_second",
    "prefill_seconds",
    "peak_memory",
)
"""What is read if nobody says otherwise: all of it from one run."""
