"""Scores by the attention that the last query paid."""

from typing import Any, ClassVar, Literal

from attrs import field, frozen
from torch import Tensor

from kvframe.attention import attention_sums
from kvframe.types import PromptInputs, StepInputs
from kvframe.validators import one_of
from kvframe_baselines.stages.noted import NotedScorer


@frozen(kw_only=True)
class LastAttention(NotedScorer):
    """Attention weights of the query before: TOVA (2024, arXiv 2401.06104).

    A selection falls before its step attends, so what it goes by is the step before; at the first step after a prompt,
    the prompt's last token.
    """

    name: ClassVar[str] = "last-attention"
    reads_prompt: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True
    heads: Literal["layer", "kv-head"] = field(default="layer", validator=one_of("layer", "kv-head"))
    """One score for all heads of a layer, the mean of theirs, as in the paper; or one for every KV head."""

    @property
    def num_notes(self) -> int:
        return 1

    def observe_prompt(self, prompt: PromptInputs, state: Any) -> None:
        weights = attention_sums(prompt.query[:, -1:], prompt.keys, prompt.layout.sm_scale, prompt.alive)
        self._note(prompt.notes[0], weights)

    def observe(self, inputs: StepInputs, weights: Tensor, state: Any) -> None:
        assert inputs.notes is not None
        self._note(inputs.notes[0], weights)

    def _note(self, notes: Tensor, weights: Tensor) -> None:
        """weights: [..., H, G, L], for notes [..., H, L]."""
        means = weights.mean(-2)
        notes.copy_(means.mean(-2, keepdim=True) if self.heads == "layer" else means)
