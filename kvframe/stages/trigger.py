"""Slot one: does this step select anew?"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages.base import Slot, Stage
from kvframe.types import Decision, LayerLayout, PromptInputs, StepInputs
from kvframe.validators import integer


class Trigger(Stage):
    """Decides, for every KV head of every sequence, whether a step selects anew. Decisions stay on the device."""

    slot: ClassVar[Slot] = "trigger"
    attends_in_full: ClassVar[bool] = False
    """Whether decisions may have heads attend to everything, which reads all rows from the store."""
    reads_prompt: ClassVar[bool] = False
    """Whether `observe_prompt` is to be called."""

    @property
    def selects_ahead(self) -> bool:
        """Whether decisions may have heads select for the next step."""
        return False

    @property
    def reviews(self) -> bool:
        """Whether `review` has the last word on the heads that are due. Needs a selector that `ranks`."""
        return False

    @abstractmethod
    def init(self, layout: LayerLayout) -> Any:
        """Running state of one layer."""

    def observe_prompt(self, prompt: PromptInputs, state: Any) -> None:
        """Tokens of a prompt attend in full: remember what decides later. Called before `begin`."""

    @abstractmethod
    def begin(self, query: Tensor, state: Any) -> None:
        """The prompt, or the next turn's text, has been read; `query` [B, Hq, D] is that of its last token."""

    @abstractmethod
    def step(self, inputs: StepInputs, state: Any) -> Decision:
        """One generated token."""

    def review(self, inputs: StepInputs, missed: Tensor, state: Any) -> Tensor:
        """Of the heads that are due, those that retrieve after all: bool [B, H].

        missed: floating point [B, H], the largest share of a head's attention, mean over its query heads, that a token
        would get which is not on the device, as far as the selector can tell. Called after `step`, where `reviews`.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it reviews, and defines no review")


def everywhere(value: bool, layout: LayerLayout) -> Tensor:
    """bool [B, H], the same for every head."""
    return torch.full((layout.batch_size, layout.num_kv_heads), value, dtype=torch.bool, device=layout.device)


@frozen(kw_only=True)
class EveryStep(Trigger):
    """Select at every step, as Quest, ArkVale and ClusterKV do."""

    name: ClassVar[str] = "every-step"
    capturable: ClassVar[bool] = True

    def init(self, layout: LayerLayout) -> Decision:
        return Decision(due=everywhere(True, layout))

    def begin(self, query: Tensor, state: Decision) -> None:
        pass

    def step(self, inputs: StepInputs, state: Decision) -> Decision:
        return state


@frozen(kw_only=True)
class Never(Trigger):
    """Never select. Only sinks, window and what was resident before are attended."""

    name: ClassVar[str] = "never"
    capturable: ClassVar[bool] = True

    def init(self, layout: LayerLayout) -> Decision:
        return Decision(due=everywhere(False, layout))

    def begin(self, query: Tensor, state: Decision) -> None:
        pass

    def step(self, inputs: StepInputs, state: Decision) -> Decision:
        return state


@frozen(kw_only=True, eq=False)
class _Counter:
    steps: Tensor  # int64 [B, H], steps since the prompt or the last turn's text


@frozen(kw_only=True)
class FixedStride(Trigger):
    """Select at the first step after the prompt and at every `stride`-th from there."""

    name: ClassVar[str] = "fixed-stride"
    capturable: ClassVar[bool] = True
    stride: int = field(default=16, validator=integer(at_least=1))
    """Steps from one selection to the next."""

    def init(self, layout: LayerLayout) -> _Counter:
        return _Counter(steps=everywhere(False, layout).long())

    def begin(self, query: Tensor, state: _Counter) -> None:
        state.steps.zero_()

    def step(self, inputs: StepInputs, state: _Counter) -> Decision:
        due = state.steps % self.stride == 0
        state.steps.add_(1)
        return Decision(due=due)


@frozen(kw_only=True)
class Once(Trigger):
    """Select at the first step after the prompt, or after a turn's text, and then no more."""

    name: ClassVar[str] = "once"
    capturable: ClassVar[bool] = True

    def init(self, layout: LayerLayout) -> _Counter:
        return _Counter(steps=everywhere(False, layout).long())

    def begin(self, query: Tensor, state: _Counter) -> None:
        state.steps.zero_()

    def step(self, inputs: StepInputs, state: _Counter) -> Decision:
        due = state.steps == 0
        state.steps.add_(1)
        return Decision(due=due)
