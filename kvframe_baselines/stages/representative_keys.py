"""A unit stands for itself by the keys of its tokens that their neighbourhood attends to most."""

from typing import Any, ClassVar, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages import Scorer
from kvframe.stages.scorer import Index
from kvframe.types import PromptInputs, StepInputs, UnitTable
from kvframe.validators import integer, one_of

_QUERIES_AT_ONCE = 256


@frozen(kw_only=True)
class RepresentativeKeys(Scorer):
    """Product of the query with the keys of a unit's most attended tokens: InfLLM (2024, arXiv 2402.04617).

    A token's weight is the attention that it receives from the tokens up to `local_size` behind it, summed over them
    and meaned over the query heads that share a KV head: when a prompt is read, under a softmax over those
    `local_size` tokens; from generated tokens, as they attend, while the token lies in the window. A unit's `num_keys`
    heaviest tokens stand for it. A product with each of them, summed, ranks units as the product with their mean does,
    so only that is kept.
    """

    name: ClassVar[str] = "representative-keys"
    reads_prompt: ClassVar[bool] = True
    reads_attention: ClassVar[bool] = True
    capturable: ClassVar[bool] = True
    num_keys: int = field(default=4, validator=integer(at_least=1))
    """Tokens of a unit that stand for it."""
    local_size: int = field(default=4096, validator=integer(at_least=1))
    """How many tokens a prompt's token is weighed by: itself and those behind it."""
    heads: Literal["layer", "kv-head"] = field(default="layer", validator=one_of("layer", "kv-head"))
    """One score for all heads of a layer, the mean of theirs, which takes units that are the same in all heads; or one
    for every KV head."""

    @property
    def num_notes(self) -> int:
        return 1

    def observe_prompt(self, prompt: PromptInputs, state: Any) -> None:
        order = prompt.positions().argsort(-1)
        keys = prompt.keys.gather(1, order[..., None].expand_as(prompt.keys))
        received = _local_attention(prompt.query, keys, prompt.layout.sm_scale, self.local_size)
        prompt.notes[0].scatter_add_(1, order, received.to(prompt.notes.dtype))

    def observe(self, inputs: StepInputs, weights: Tensor, state: Any) -> None:
        assert inputs.notes is not None
        # Of tokens that have left the window the summary is made, and what is added no longer matters.
        inputs.notes[0].add_(weights.mean(2))

    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        return self.index_noted(keys, values, unit_ids, num_units, None)

    def index_noted(
        self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int, notes: Tensor | None
    ) -> dict[str, Tensor]:
        """The mean of the representative keys; of tokens with equal weights the earlier ones are taken."""
        weights = torch.zeros_like(unit_ids, dtype=torch.float32) if notes is None else notes[0]
        # By unit, and inside a unit by weight.
        order = weights.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(1, unit_ids.gather(1, order).argsort(dim=-1, stable=True))
        ids = unit_ids.gather(1, order)
        columns = torch.arange(num_units + 1, device=ids.device).expand(ids.shape[0], -1).contiguous()
        starts = torch.searchsorted(ids, columns)
        rank = torch.arange(ids.shape[1], device=ids.device) - starts.gather(1, ids)
        # The last column collects what stands for nothing.
        column = torch.where(rank < self.num_keys, ids, num_units)
        dtype = torch.promote_types(keys.dtype, torch.float32)
        place = order[..., None].expand_as(keys)
        sums = keys.new_zeros(keys.shape[0], num_units + 1, keys.shape[-1], dtype=dtype)
        sums.scatter_add_(1, column[..., None].expand_as(keys), keys.gather(1, place).to(dtype))
        counts = sums.new_zeros(sums.shape[:2]).scatter_add_(1, column, torch.ones_like(column, dtype=dtype))
        return {"mean_key": (sums / counts.clamp(min=1)[..., None])[:, :num_units].to(keys.dtype)}

    def score(self, inputs: StepInputs, index: Index, units: UnitTable) -> Tensor:
        from kvframe_kernels.unit_scores import unit_scores

        scores = unit_scores(
            inputs.query,
            index["mean_key"],
            units.num_units,
            inputs.layout.sm_scale,
            reduction="mean",
            softmax=False,
            due=inputs.due if self.heads == "kv-head" else None,
        )
        if self.heads == "kv-head":
            return scores
        absent = torch.arange(units.max_units, device=scores.device) >= units.num_units[..., None]
        mean = scores.masked_fill(absent, 0).mean(1, keepdim=True)
        return mean.expand_as(scores).masked_fill(absent, -torch.inf)


def _local_attention(query: Tensor, keys: Tensor, sm_scale: float, local_size: int) -> Tensor:
    """What each of L tokens, in the order of the text, gets from the last T of them under causal attention over the
    nearest `local_size`.

    query: [Hq, T, D]; keys: [H, L, D]. Returns [H, L] in at least float32, the mean over the query heads of a group.
    """
    num_queries, (num_kv_heads, num_keys, _) = query.shape[1], keys.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.reshape(num_kv_heads, -1, num_queries, query.shape[-1])
    received = torch.zeros(num_kv_heads, num_keys, dtype=dtype, device=keys.device)
    for start in range(0, num_queries, _QUERIES_AT_ONCE):
        block = grouped[:, :, start : start + _QUERIES_AT_ONCE]
        first = num_keys - num_queries + start
        low, high = max(0, first - local_size + 1), first + block.shape[2]
        distance = torch.arange(first, high, device=keys.device)[:, None] - torch.arange(low, high, device=keys.device)
        near = (distance >= 0) & (distance < local_size)
        scores = torch.matmul((block * sm_scale).flatten(1, 2), keys[:, low:high].transpose(1, 2)).to(dtype)
        weights = scores.view(*block.shape[:3], -1).masked_fill(~near, -torch.inf).softmax(-1)
        received[:, low:high] += weights.mean(1).sum(1)
    return received
