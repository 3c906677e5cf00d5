"""Selection in two passes: units first, then their tokens, ranked by keys in a few bits."""

import math
from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.sketch import decode_sketch, encode_sketch
from kvframe.stages.selector import Selector, only_due
from kvframe.types import StepInputs, UnitTable
from kvframe.validators import integer, one_of

# No row; behind every row when sorted. A power of two, because padding takes its value through a float.
_NONE = 1 << 62


@frozen(kw_only=True)
class SketchRerank(Selector):
    """The best units up to a multiple of the budget, and of their tokens the best by a sketch of their keys.

    The sketch of a key is its difference to the mean key of its unit in a few bits, kept on the device; what a token's
    score misses is then a small part of a small number. Scores of tokens are made one per KV head as those of units:
    softmax over the candidates for every query head, then the mean over the heads of a group.
    """

    name: ClassVar[str] = "sketch-rerank"
    capturable: ClassVar[bool] = True
    token_budget: int = field(default=1024, validator=integer(at_least=1))
    """Tokens that every head retrieves, where there are as many."""
    oversample: int = field(default=4, validator=integer(at_least=1))
    """The candidates are so many times the budget."""
    bits: Literal[2, 4, 8] = field(default=4, validator=one_of(2, 4, 8))
    """Of a number in the sketch."""
    run_length: int = field(default=1, validator=integer(at_least=1))
    """Candidates that lie next to each other in the store and are taken together: longer runs cross the link faster."""
    scales: Literal["token", "channel"] = field(default="token", validator=one_of("token", "channel"))
    """One step for the numbers of each token; or, "channel", the same after every channel was divided by its own size
    in the head's first rows, so that the few large channels that keys have do not set every step."""

    @property
    def capacity(self) -> int:
        return self.token_budget

    @property
    def needs_means(self) -> bool:
        return True

    @property
    def scales_channels(self) -> bool:
        return self.scales == "channel"

    def row_index(
        self, keys: Tensor, values: Tensor, centres: Tensor, channels: Tensor | None = None
    ) -> dict[str, Tensor]:
        return encode_sketch(keys - centres, self.bits, channels)

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> tuple[Tensor, Tensor]:
        from kvframe_kernels.select_units import select_units

        rows, count = select_units(scores, units.offsets, self.oversample * self.token_budget, due=inputs.due)
        rows, count = only_due(rows, count, inputs.due)
        # In the order of the store, so that runs are runs and ties go to the lower row.
        rows = torch.where(rows < 0, _NONE, rows).sort(-1).values
        weights = self._weights(inputs, rows, count, units)
        return self._best(rows, count, weights)

    def _weights(self, inputs: StepInputs, rows: Tensor, count: Tensor, units: UnitTable) -> Tensor:
        """Of every candidate, its share of the attention to all candidates: [B, H, C], 0 behind the count."""
        layout = inputs.layout
        exists = torch.arange(rows.shape[-1], device=rows.device) < count[..., None]
        place = torch.where(exists, rows, 0)
        codes, step = (self._at(units.row_index[name], place) for name in ("codes", "step"))
        rest = decode_sketch(codes, step, self.bits, layout.head_dim)  # [B, H, C, D]
        query = inputs.query.to(rest.dtype).view(*rows.shape[:2], -1, layout.head_dim) * layout.sm_scale
        # What keys were divided by, their queries are multiplied with.
        scaled = query if units.channels is None else query * units.channels[:, :, None]
        products = torch.matmul(scaled, rest.transpose(2, 3))  # [B, H, G, C]
        centres = torch.matmul(query, units.index["mean_key"].to(rest.dtype).transpose(2, 3))  # [B, H, G, U]
        unit = self._unit_of(place, units)[:, :, None].expand(-1, -1, query.shape[2], -1)
        products = (products + centres.gather(-1, unit)).masked_fill(~exists[:, :, None], -math.inf)
        return products.softmax(-1).mean(2).nan_to_num(0.0)

    @staticmethod
    def _at(tensor: Tensor, rows: Tensor) -> Tensor:
        """[B, H, C, ...] of a tensor [B, H, R, ...]."""
        return tensor.gather(2, rows[..., None].expand(*rows.shape, tensor.shape[-1]))

    @staticmethod
    def _unit_of(rows: Tensor, units: UnitTable) -> Tensor:
        """int64 [B, H, C], the unit that a row belongs to."""
        offsets = units.offsets[..., : units.max_units + 1].long()
        absent = torch.arange(units.max_units + 1, device=rows.device) > units.num_units[..., None]
        bounds = offsets.masked_fill(absent, torch.iinfo(torch.int64).max)
        return (torch.searchsorted(bounds, rows, right=True) - 1).clamp(0, units.max_units - 1)

    def _best(self, rows: Tensor, count: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The best runs, cut so that the budget is filled exactly."""
        size, budget = self.run_length, self.token_budget
        missing = -rows.shape[-1] % size
        weights = torch.nn.functional.pad(weights, (0, missing))
        rows = torch.nn.functional.pad(rows, (0, missing), value=_NONE)
        runs = weights.view(*rows.shape[:2], -1, size).sum(-1)
        # Behind all that exist, and in their order.
        starts = torch.arange(runs.shape[-1], device=rows.device) * size
        runs = runs.masked_fill(starts >= count[..., None], -math.inf)
        order = runs.sort(dim=-1, descending=True, stable=True).indices
        ranked = rows.view(*rows.shape[:2], -1, size).gather(2, order[..., None].expand(-1, -1, -1, size)).flatten(2)
        # A last run that is not full has its gap in the middle, once runs are ranked: close it.
        absent = ranked == _NONE
        ranked = ranked.gather(-1, absent.to(torch.uint8).sort(dim=-1, stable=True).indices)[..., :budget]
        taken = count.clamp(max=budget)
        places = torch.arange(ranked.shape[-1], device=rows.device)
        ranked = ranked.masked_fill(places >= taken[..., None], -1)
        return torch.nn.functional.pad(ranked, (0, budget - ranked.shape[-1]), value=-1), taken
