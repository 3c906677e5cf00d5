"""Scores by when a token was last attended to."""

from typing import Any, ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages.scorer import Index
from kvframe.types import PromptInputs, StepInputs, UnitTable
from kvframe.validators import share
from kvframe_baselines.stages.noted import NotedScorer

_PROMPT = float(1 << 23)
"""Added to the stamps of prompt tokens, so that they rank before all others; float32 counts on exactly from here."""


@frozen(kw_only=True)
class LastUse(NotedScorer):
    """The step at which a token last got a noteworthy share of attention, prompt tokens before all others: RaaS (2025,
    arXiv 2502.11147).

    A token is stamped with its own position, and anew with that of every token whose query gives it more than `alpha`,
    on average over the query heads that share a KV head. A unit has the newest stamp of its tokens.
    """

    name: ClassVar[str] = "last-use"
    reads_prompt: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True
    alpha: float = field(default=1e-4, validator=share)
    """Share of the softmax above which a token counts as used."""

    @property
    def num_notes(self) -> int:
        return 1

    def observe_prompt(self, prompt: PromptInputs, state: Any) -> None:
        num_tokens, stop = prompt.query.shape[1], prompt.keys.shape[1]
        prompt.notes[0, :, stop - num_tokens :] = _PROMPT + torch.arange(
            stop - num_tokens, stop, device=prompt.notes.device
        )

    def observe(self, inputs: StepInputs, weights: Tensor, state: Any) -> None:
        assert inputs.notes is not None and inputs.num_tokens is not None
        stamps, now = inputs.notes[0], (inputs.num_tokens - 1)[..., None]
        stamps.scatter_(-1, now, now.to(stamps.dtype))
        used = weights.mean(2) > self.alpha
        stamps.copy_(torch.where(used, now + _PROMPT * (stamps >= _PROMPT), stamps))

    def score(self, inputs: StepInputs, index: Index, units: UnitTable) -> Tensor:
        assert inputs.notes is not None
        return units.of_rows(inputs.notes[0], "amax")
