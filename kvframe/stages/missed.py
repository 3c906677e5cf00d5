"""Retrieve where something would be attended to that is not there."""

from typing import Any, ClassVar

from attrs import define, field, frozen
from torch import Tensor

from kvframe.stages.trigger import EveryStep, Trigger, everywhere
from kvframe.types import Decision, LayerLayout, PromptInputs, StepInputs
from kvframe.validators import part, share


@define(eq=False)
class MissedState:
    """Running state of one layer."""

    events: Any
    """State of the trigger that says where the text turns."""
    due: Tensor  # bool [B, H], all True
    first: Tensor  # bool [B, H], nothing was selected since the prompt


@frozen(kw_only=True)
class MissedShare(Trigger):
    """Retrieve where a token that is not on the device would get more than a share of a head's attention.

    At every step the candidates of the selection are looked up, and the largest share among those that are not on the
    device is compared with `share`: the mean over the query heads of a KV head, of the attention to sinks, window and
    candidates. Each head decides on its own, so that those whose attention moves retrieve often, and the others hardly
    ever. The first step after a prompt always retrieves. Ours, from no paper. Needs a selector that weighs tokens, such
    as SketchRerank.
    """

    name: ClassVar[str] = "missed-share"
    capturable: ClassVar[bool] = True
    share: float = field(default=0.03, validator=share)
    """Of the attention; what a single token may miss it by."""
    events: Trigger = field(factory=EveryStep, validator=part(Trigger))
    """Says where the text turns, which cuts segments; what it would retrieve is not."""

    @property
    def reviews(self) -> bool:
        return True

    @property
    def reads_prompt(self) -> bool:  # type: ignore[override]
        return self.events.reads_prompt

    def init(self, layout: LayerLayout) -> MissedState:
        return MissedState(
            events=self.events.init(layout), due=everywhere(True, layout), first=everywhere(True, layout)
        )

    def observe_prompt(self, prompt: PromptInputs, state: MissedState) -> None:
        self.events.observe_prompt(prompt, state.events)

    def begin(self, query: Tensor, state: MissedState) -> None:
        self.events.begin(query, state.events)
        state.first.fill_(True)

    def step(self, inputs: StepInputs, state: MissedState) -> Decision:
        decision = self.events.step(inputs, state.events)
        return Decision(due=state.due, event=decision.due if decision.event is None else decision.event)

    def review(self, inputs: StepInputs, missed: Tensor, state: MissedState) -> Tensor:
        from kvframe_kernels.missed_share import exceeds

        return exceeds(missed, self.share, state.first)
