"""Stages that retrieve by a schedule instead of by the text, at the full price of the stages they stand for.

A model with random weights fires and misses as it happens to. Here both are set: how often a layer selects, and which
share of a selection is not resident. Trigger, scorer and selector of the policy still do all their work.
"""

from functools import cached_property
from typing import Any, ClassVar

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from kvframe.bench.forced_reference import forced_scores_reference, scheduled_due_reference
from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.stages import SelectorAround, SketchRerank, Trigger
from kvframe.types import Candidates, Decision, LayerLayout, Selection, StepInputs, UnitTable
from kvframe.validators import integer


def _share(instance: Any, attribute: Any, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{type(instance).__name__}.{attribute.name} must lie between 0 and 1, got {value}")


def force(policy: Policy, *, fire_rate: float, miss: float, num_steps: int, seed: int = 0) -> Policy:
    """The policy with firing and missing set; see `ScheduledTrigger` and `ForcedSelector`.

    Raises ConfigError for a rate outside [0, 1].
    """
    return policy.swap(
        trigger=ScheduledTrigger(inner=policy.trigger, rate=fire_rate, num_steps=num_steps, seed=seed),
        selector=ForcedSelector(selector=policy.selector, miss=miss),
    )


@define(eq=False)
class ScheduledState:
    """Running state of one layer."""

    inner: Any
    """State of the trigger that is stood for."""
    steps: Tensor  # int64 [1], steps since the prompt
    schedule: Tensor  # bool [num_steps, B]
    due: Tensor  # bool [B, H]


@frozen(kw_only=True)
class ScheduledTrigger(Trigger):
    """Due at the first step after the prompt, then at steps drawn beforehand for every layer and sequence.

    Of `num_steps` steps, exactly the rounded share `rate` is due; afterwards the schedule repeats. `inner` runs at
    every step, and reviews where it does; its answer is dropped.
    """

    name: ClassVar[str] = "scheduled"
    capturable: ClassVar[bool] = True
    inner: Trigger = field()
    """The trigger whose price is paid."""
    rate: float = field(validator=_share)
    """Share of steps that are due."""
    num_steps: int = field(default=512, validator=integer(at_least=1))
    """Length of the schedule."""
    seed: int = 0
    """Draws the schedule, for every layer another."""

    def init(self, layout: LayerLayout) -> ScheduledState:
        generator = torch.Generator().manual_seed(self.seed * 1000 + layout.layer_idx)
        num_due = round(self.rate * self.num_steps)
        ranks = [torch.randperm(self.num_steps, generator=generator) for _ in range(layout.batch_size)]
        heads = (layout.batch_size, layout.num_kv_heads)
        return ScheduledState(
            inner=self.inner.init(layout),
            steps=torch.zeros(1, dtype=torch.int64, device=layout.device),
            schedule=(torch.stack(ranks, 1) < num_due).to(layout.device),
            due=torch.zeros(heads, dtype=torch.bool, device=layout.device),
        )

    @property
    def reviews(self) -> bool:
        return self.inner.reviews

    def begin(self, query: Tensor, state: ScheduledState) -> None:
        self.inner.begin(query, state.inner)
        state.steps.zero_()

    def step(self, inputs: StepInputs, state: ScheduledState) -> Decision:
        decision = self.inner.step(inputs, state.inner)
        if state.due.device.type == "cpu":
            scheduled_due_reference(state.steps, state.schedule, state.due)
        else:
            from kvframe.bench.forced_kernel import scheduled_due_triton

            scheduled_due_triton(state.steps, state.schedule, state.due)
        return Decision(due=decision.due, event=state.due) if self.reviews else Decision(due=state.due)

    def review(self, inputs: StepInputs, missed: Tensor, state: ScheduledState) -> Tensor:
        self.inner.review(inputs, missed, state.inner)
        return state.due


@frozen(kw_only=True, slots=False)
class ForcedSelector(SelectorAround):
    """Selects by scores of its own, so that on average a share `miss` of the selected tokens was not selected before.

    Units lie in a fixed mixed order on a ring; a selection is a stretch of it, and the next one begins `miss` times its
    tokens further on. `selector` selects by these scores. Less is missed where all units together hold less than
    1 + `miss` stretches, and where `miss` is close to 1: some stretches reach beyond the beginning of the next.

    Where `selector` ranks the tokens of the best units by a sketch, the stretch is its candidates, and it ranks them by
    a query that is always the same: a token's rank depends on nothing but its key, so that about the share of the
    candidates that goes is that of the selected tokens. The rates that come out are in the result.

    One cache at a time: the places of the stretches belong to the stage, because a selector has no running state.
    """

    name: ClassVar[str] = "forced"
    capturable: ClassVar[bool] = True
    miss: float = field(validator=_share)
    """Share of a selection that is not resident."""

    @property
    def _reranking(self) -> SketchRerank | None:
        """What ranks the tokens of the best units; None where units are taken as they are."""
        return next((part for part in self.selector.with_parts() if isinstance(part, SketchRerank)), None)

    @property
    def _stretch(self) -> int:
        """Tokens of the best units that `selector` looks at."""
        return self.capacity if self._reranking is None else self._reranking.num_candidates

    @cached_property
    def _starts(self) -> dict[tuple[int, tuple[int, ...], torch.device], Tensor]:
        """int64 [B, H] for every layer: where on the ring its selections begin."""
        return {}

    @cached_property
    def _queries(self) -> dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor]:
        """[B, Hq, D], what tokens are ranked by."""
        return {}

    def _query_like(self, query: Tensor) -> Tensor:
        key = (tuple(query.shape), query.dtype, query.device)
        if key not in self._queries:
            # Made on the device: a copy from the host would make it wait.
            numbers = torch.arange(query.numel(), dtype=torch.float32, device=query.device)
            self._queries[key] = numbers.sin().view(query.shape).to(query.dtype)
        return self._queries[key]

    def _start_of(self, layer_idx: int, due: Tensor) -> Tensor:
        key = (layer_idx, tuple(due.shape), due.device)
        if key not in self._starts:
            if due.is_cuda and torch.cuda.is_current_stream_capturing():
                # Made here, it would be zero again in every replay.
                raise ConfigError("ForcedSelector must run one step before it is captured in a CUDA graph")
            self._starts[key] = torch.zeros(due.shape, dtype=torch.int64, device=due.device)
        return self._starts[key]

    @property
    def ranks(self) -> bool:
        return self.selector.ranks

    def choose(
        self, inputs: StepInputs, candidates: Candidates, scores: Tensor, units: UnitTable
    ) -> Selection | tuple[Tensor, Tensor]:
        # A review has looked at candidates of the policy's own, at their full price.
        return self.select(inputs, scores, units)

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> Selection | tuple[Tensor, Tensor]:
        due = inputs.due
        if due is None:
            due = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
        starts = self._start_of(inputs.layout.layer_idx, due)
        arguments = (starts, due, units.offsets, units.num_units, scores.shape[-1], round(self.miss * self._stretch))
        if scores.device.type == "cpu":
            forced = forced_scores_reference(*arguments)
        else:
            from kvframe.bench.forced_kernel import forced_scores_triton

            forced = forced_scores_triton(*arguments)
        if self._reranking is not None:
            inputs = evolve(inputs, query=self._query_like(inputs.query))
        return self.selector.select(inputs, forced, units)
