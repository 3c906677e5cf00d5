"""Scores by all the attention that a token has received so far."""

from typing import Any, ClassVar

from attrs import frozen
from torch import Tensor

from kvframe.attention import attention_sums
from kvframe.types import PromptInputs, StepInputs
from kvframe_baselines.stages.noted import NotedScorer


@frozen(kw_only=True)
class AccumulatedAttention(NotedScorer):
    """Attention weights that a token has received, added up over the prompt's queries and every step since: H2O (2023,
    arXiv 2306.14048).

    The sum of each query head, and its mean over the heads that share a KV head.
    """

    name: ClassVar[str] = "accumulated-attention"
    reads_prompt: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True

    @property
    def num_notes(self) -> int:
        return 1

    def observe_prompt(self, prompt: PromptInputs, state: Any) -> None:
        sums = attention_sums(prompt.query, prompt.keys, prompt.layout.sm_scale, prompt.alive)
        prompt.notes[0].add_(sums.mean(1))

    def observe(self, inputs: StepInputs, weights: Tensor, state: Any) -> None:
        assert inputs.notes is not None
        inputs.notes[0].add_(weights.mean(2))
