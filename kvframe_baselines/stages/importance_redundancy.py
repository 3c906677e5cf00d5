"""Scores that weigh attention against how often the same thing is said."""

from typing import ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages import Scorer
from kvframe.stages.scorer import Index
from kvframe.types import LayerLayout, LeavingUnits, PromptInputs, StepInputs, UnitTable
from kvframe.validators import finite_number, integer, odd, share
from kvframe_baselines.stages.recent import RecentTokens

_PAIRS_AT_ONCE = 1 << 24


@frozen(kw_only=True)
class ImportanceRedundancy(Scorer):
    """Attention from the last queries, less the resemblance to other keys: R-KV (2025, arXiv 2505.24133).

    A score is `mix` * importance - (1 - `mix`) * redundancy. Importance: of the products of the last
    `observation_window` queries with the candidates' keys the largest in a group, softmax over the candidates, mean
    over the queries, and the largest among `kernel_size` neighbours. Redundancy: the mean cosine of a key with all
    others, softmax over the keys; where a key has others nearer than `similarity`, the newest of them is exempt from
    that pair, so that one of a set of duplicates stays.

    Candidates are units outside sinks and window, in the order of the text, without what is gone; the keys of the last
    `observation_window` tokens are among the others. Costs the square of their number, so it suits small budgets, and
    it reads the device to know the number. Keeps the mean key of every unit.
    """

    name: ClassVar[str] = "importance-redundancy"
    reads_prompt: ClassVar[bool] = True
    mix: float = field(default=0.1, validator=share)
    """Weight of the importance; the paper's lambda."""
    observation_window: int = field(default=8, validator=integer(at_least=1))
    """Queries that are asked."""
    kernel_size: int = field(default=7, validator=[integer(at_least=1), odd])
    """Neighbouring candidates that are pooled; odd."""
    similarity: float = field(default=0.5, validator=finite_number)
    """Cosine above which two keys are taken for duplicates."""

    def init(self, layout: LayerLayout) -> RecentTokens:
        return RecentTokens.none(layout, self.observation_window)

    def observe_prompt(self, prompt: PromptInputs, state: RecentTokens) -> None:
        state.extend(prompt.batch, prompt.query, prompt.keys[:, -prompt.query.shape[1] :])

    def probe(self, inputs: StepInputs, state: RecentTokens) -> Tensor:
        assert inputs.key is not None
        state.append(inputs.query, inputs.key)
        return inputs.query

    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        from kvframe_kernels.unit_index import unit_mean

        return {"mean_key": unit_mean(keys, unit_ids, num_units)}

    def extend(self, index: Index, unit: LeavingUnits) -> None:
        from kvframe_kernels.unit_index import window_mean

        window_mean(
            index["mean_key"], unit.column, unit.leaves, unit.start, unit.size,
            unit.keys, unit.ring_first, unit.ring_size,
        )  # fmt: skip

    def score(self, inputs: StepInputs, index: Index, units: UnitTable) -> Tensor:
        keys = index["mean_key"]
        dtype = torch.promote_types(keys.dtype, torch.float32)
        scores = torch.full(keys.shape[:3], -torch.inf, dtype=dtype, device=keys.device)
        candidates = self._candidates(inputs, units)
        most = int(candidates.sum(-1).max()) if inputs.due is None or bool(inputs.due.any()) else 0
        if most == 0:
            return scores
        place = (~candidates).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :most]
        there = candidates.gather(-1, place)
        own = keys.gather(2, place[..., None].expand(-1, -1, -1, keys.shape[-1])).to(dtype)
        queries, recent, is_recent = inputs.state.ordered()
        importance = self._importance(queries.to(dtype) * inputs.layout.sm_scale, is_recent, own, there)
        others = torch.cat([own, recent.to(dtype)], 2)
        exist = torch.cat([there, is_recent[:, None].expand(-1, keys.shape[1], -1)], 2)
        redundancy = self._redundancy(others, exist)[..., :most]
        mixed = self.mix * importance - (1 - self.mix) * redundancy
        return scores.scatter_(-1, place, mixed.masked_fill(~there, -torch.inf))

    def _candidates(self, inputs: StepInputs, units: UnitTable) -> Tensor:
        """bool [B, H, U]: units of which something is left."""
        columns = torch.arange(units.max_units, device=units.num_units.device)
        exist = columns < units.num_units[..., None]
        if inputs.alive is None:
            return exist
        return exist & (units.of_rows(inputs.alive.float(), "amax") > 0)

    def _importance(self, queries: Tensor, is_recent: Tensor, keys: Tensor, there: Tensor) -> Tensor:
        """queries [B, Hq, W, D], bool [B, W]; keys [B, H, n, D], bool [B, H, n]. Returns [B, H, n]."""
        grouped = queries.reshape(*keys.shape[:2], -1, *queries.shape[2:])
        products = torch.matmul(grouped, keys[:, :, None].transpose(3, 4)).amax(2)  # [B, H, W, n]
        # A head without candidates is 0/0.
        shares = products.masked_fill(~there[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        asked = is_recent[:, None, :, None]
        means = (shares * asked).sum(2) / asked.sum(2).clamp(min=1)
        return torch.nn.functional.max_pool1d(means, self.kernel_size, stride=1, padding=self.kernel_size // 2)

    def _redundancy(self, keys: Tensor, there: Tensor) -> Tensor:
        """keys [B, H, m, D] in the order of the text, bool [B, H, m]. Returns [B, H, m]; they add up to 1."""
        batch_size, num_kv_heads, num_keys, _ = keys.shape
        directions = torch.nn.functional.normalize(keys, dim=-1)
        sums = keys.new_zeros(batch_size, num_kv_heads, num_keys)
        columns = torch.arange(num_keys, device=keys.device)
        at_once = max(1, _PAIRS_AT_ONCE // (batch_size * num_kv_heads * num_keys))
        for start in range(0, num_keys, at_once):
            rows = columns[start : start + at_once]
            cosines = torch.matmul(directions[:, :, rows], directions.transpose(2, 3))
            pairs = there[:, :, rows, None] & there[:, :, None] & (columns != rows[:, None])
            newest = torch.where(pairs & (cosines > self.similarity), columns, -1).amax(-1, keepdim=True)
            sums += cosines.masked_fill(~pairs | (columns == newest), 0).sum(2)
        means = sums / there.sum(-1, keepdim=True).clamp(min=1)
        return means.masked_fill(~there, -torch.inf).softmax(-1).nan_to_num(0.0)
