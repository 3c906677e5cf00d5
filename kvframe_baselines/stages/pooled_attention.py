"""Scores by the attention of the last step that saw everything."""

from typing import Any, ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.attention import attention_sums
from kvframe.stages import Scorer
from kvframe.stages.scorer import Index
from kvframe.types import LeavingUnits, PromptInputs, StepInputs, UnitTable
from kvframe.validators import integer, odd


@frozen(kw_only=True)
class PooledAttention(Scorer):
    """Attention weights of the last query that attended to everything, pooled along the text.

    The largest weight among the query heads that share a KV head, and among neighbouring tokens; a unit has that of its
    best token. RefreshKV (2024, arXiv 2411.05787). A prompt's last token attends to everything; later steps count where
    the trigger has them attend in full. Under a trigger that never has, every step counts, and what it did not attend
    to has weight 0.
    """

    name: ClassVar[str] = "pooled-attention"
    reads_prompt: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True
    capturable: ClassVar[bool] = True
    kernel_size: int = field(default=7, validator=[integer(at_least=1), odd])
    """Neighbouring tokens that are pooled; odd."""

    @property
    def num_notes(self) -> int:
        return 1

    def observe_prompt(self, prompt: PromptInputs, state: Any) -> None:
        weights = attention_sums(prompt.query[:, -1:], prompt.keys, prompt.layout.sm_scale, prompt.alive).amax(1)
        order = prompt.positions().argsort(-1)
        prompt.notes[0].scatter_(1, order, self._pooled(weights.gather(1, order)).to(prompt.notes.dtype))

    def observe(self, inputs: StepInputs, weights: Tensor, state: Any) -> None:
        assert inputs.notes is not None
        pooled = self._pooled(weights.amax(2)).to(inputs.notes.dtype)
        if inputs.full is not None:
            pooled = torch.where(inputs.full[..., None], pooled, inputs.notes[0])
        inputs.notes[0].copy_(pooled)

    def _pooled(self, weights: Tensor) -> Tensor:
        """Along the last axis."""
        return torch.nn.functional.max_pool1d(weights, self.kernel_size, stride=1, padding=self.kernel_size // 2)

    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        return {}

    def extend(self, index: Index, unit: LeavingUnits) -> None:
        pass

    def score(self, inputs: StepInputs, index: Index, units: UnitTable) -> Tensor:
        assert inputs.notes is not None
        return units.of_rows(inputs.notes[0], "amax")
