"""Shapes and words, defined once.

Letters used in every docstring:

    B   batch rows (sequences)          T   tokens of a call
    Hq  query heads (num_qo_heads)      U   units, padded to the largest head's number
    H   key/value heads (num_kv_heads)  R   rows of the pool, one a token
    G   query heads per KV head         C   resident slots (a selector's capacity)
    D   width of a key, Dv of a value   N   attention slots: sinks | resident | ring

A *position* counts the real tokens of one sequence from 0 (left padding does not count). A *row* is a token's place in
the pool: its position, except inside a prompt block, whose tokens lie in unit order.
"""

import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor

Execution = Literal["offload", "dense", "shadow"]


@frozen(kw_only=True, eq=False)
class LayerLayout:
    """Shape and placement of one attention layer, as its first keys and values showed them."""

    layer_idx: int
    num_layers: int
    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    sm_scale: float
    rotate: Callable[[Tensor, int], Tensor] | None = None
    """Turns post-RoPE queries [B, Hq, D] by a number of positions; None where the model's rotation is not known."""

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_qo_heads // self.num_kv_heads

    def zeros(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys [B, H, num_tokens, D] and values [B, H, num_tokens, Dv], all zero, on the device."""
        heads = (self.batch_size, self.num_kv_heads, num_tokens)
        return (
            torch.zeros(*heads, self.head_dim, dtype=self.dtype, device=self.device),
            torch.zeros(*heads, self.value_dim, dtype=self.dtype, device=self.device),
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in one KV head."""
        return (self.head_dim + self.value_dim) * self.dtype.itemsize


@frozen(kw_only=True)
class ModelLayout:
    """What is known of a model before its first forward pass."""

    num_layers: int
    retrieval_layers: tuple[int, ...]
    """Layers a policy can manage: those with a full, growing KV cache."""
    device: torch.device
    dtype: torch.dtype


@frozen(kw_only=True, eq=False)
class StepInputs:
    """What stages see of one decode step. Fields may be added; a stage reads those it needs."""

    query: Tensor
    """[B, Hq, D], after RoPE: what attention sees."""
    layout: LayerLayout
    key: Tensor | None = None
    """[B, H, D], of this token, after RoPE."""
    num_tokens: Tensor | None = None
    """int64 [B, H], tokens of each sequence: without this one while the trigger and the units are asked, with it from
    there on."""
    alive: Tensor | None = None
    """bool [B, H, R], rows that a store which drops still has; None where nothing is dropped."""
    due: Tensor | None = None
    """bool [B, H], the heads that select in this step, once the trigger has said so. What a scorer or a selector gives
    for the others is not used: on a device, kernels skip them."""
    state: Any = None
    """The scorer's running state, once its `probe` was asked."""
    notes: Tensor | None = None
    """float32 [F, B, H, R], what the scorer has noted of every token, by row; None for a scorer that takes no notes."""
    full: Tensor | None = None
    """bool [B, H], the heads that attend to everything in this step; None where none ever does."""
    kept_lse: Tensor | None = None
    """[B, Hq], at least float32: the log-sum-exp of the scaled scores of sinks and window, which are attended to
    whatever is selected; None unless the trigger reviews."""
    token_ids: Tensor | None = None
    """int64 [B], the id of this token; None unless a stage asks for ids."""
    row_bytes: int = 0
    """Bytes of a row in the store."""
    board: "Board | None" = None
    """What other layers have published, in this step or before."""


Board = dict[tuple[str, int], Tensor]
"""By what it is and by layer: what a layer has published for the others. One a cache."""


@frozen(kw_only=True, eq=False)
class PromptInputs:
    """What a trigger or a scorer sees of a run of prompt tokens of one sequence, when their attention is computed."""

    query: Tensor
    """[Hq, T, D], after RoPE."""
    keys: Tensor
    """[H, L, D], L >= T, in the order of the rows: those of earlier tokens, then the T of this run."""
    notes: Tensor
    """[F, H, L], of the same rows, to be written in place; 0 for a token that is new. A trigger has none, F = 0."""
    positions: Callable[[], Tensor]
    """Gives int64 [H, L], the positions of the same rows; waits for the device where there are earlier tokens."""
    alive: Tensor | None
    """bool [H, L], those of the rows that have not been dropped; None for all. What others hold means nothing."""
    batch: int
    """The sequence's place in the batch."""
    layout: LayerLayout
    board: "Board"
    """What layers have told each other; to be written where others are to know."""


@frozen(kw_only=True, eq=False)
class BlockInputs:
    """What is known of the tokens of a prompt block, besides their keys, for N heads."""

    layout: LayerLayout
    token_ids: Tensor | None = None
    """int64 [T]; None unless a stage asks for ids."""
    notes: Tensor | None = None
    """float32 [F, N, T], of a scorer that takes notes."""


@frozen(kw_only=True, eq=False)
class Decision:
    """A trigger's answer for one step."""

    due: Tensor
    """bool [B, H]: the heads that select anew in this step, before they attend."""
    ahead: Tensor | None = None
    """bool [B, H]: the heads that select with this step's query for the next one. Where the next step is due as well,
    that replaces it. Only of a trigger that says `selects_ahead`."""
    full: Tensor | None = None
    """bool [B, H]: the heads that attend to everything in this step. Only of a trigger that says `attends_in_full`."""
    event: Tensor | None = None
    """bool [B, H]: the heads whose text turns to something else, which cuts segments; None where `due` says so."""


@frozen(eq=False)
class Candidates:
    """Tokens that a selector chooses from."""

    rows: Tensor
    """int64 [B, H, n], each row once; anything behind the count."""
    count: Tensor
    """int64 [B, H]"""
    shares: Tensor
    """Floating point [B, H, n]: the share of a head's attention that each would get, mean over its query heads, as far
    as the device can tell; -inf behind the count."""


@frozen(eq=False)
class Selection:
    """A selector's answer."""

    rows: Tensor
    """int64 [B, H, capacity], each row once, with -1 behind the count."""
    count: Tensor
    """int64 [B, H]"""
    estimated: Tensor | None = None
    """bool [B, H, U]: the units whose tokens, as far as they are not attended, enter attention as one estimate; None
    where nothing is estimated."""

    @classmethod
    def of(cls, made: "Selection | tuple[Tensor, Tensor]") -> "Selection":
        """What a selector gave, which may be rows and count alone."""
        return made if isinstance(made, Selection) else cls(*made)


@frozen(kw_only=True, eq=False)
class Units:
    """Ragged units of a run of T tokens, for N heads at once."""

    order: Tensor
    """int64 [N, T]: the tokens in unit order; a permutation of range(T)."""
    sizes: Tensor
    """int64 [N, U]: tokens of each unit, zero behind the last unit of a head."""
    num_units: Tensor = field()
    """int64 [N]: units of each head."""

    @num_units.default
    def _count(self) -> Tensor:
        return (self.sizes > 0).sum(-1)

    def ids(self) -> Tensor:
        """int64 [N, T]: the unit of every token, in unit order."""
        num_heads, num_units = self.sizes.shape
        numbers = torch.arange(num_units, device=self.sizes.device).repeat(num_heads)
        ids = numbers.repeat_interleave(self.sizes.flatten(), output_size=self.order.numel())
        return ids.view(num_heads, -1)


@frozen(kw_only=True, eq=False)
class UnitTable:
    """The units that can be selected, as scorer and selector see them."""

    offsets: Tensor
    """int32 or int64 [B, H, >= U + 1]: unit u is the rows [offsets[u], offsets[u + 1])."""
    num_units: Tensor
    """int64 [B, H]: units behind it do not exist."""
    max_units: int
    """U, what scores are padded to."""
    index: Mapping[str, Tensor] = field(factory=dict)
    """[B, H, U, ...] each: the scorer's summaries."""
    means: tuple[Tensor, Tensor] | None = None
    """Mean keys [B, H, U, D] and mean values [B, H, U, Dv] of the units, those of `index`; None where the scorer keeps
    none."""
    row_index: Mapping[str, Tensor] = field(factory=dict)
    """[B, H, > R, ...] each: what the selector keeps of every row that left the window."""
    channels: Tensor | None = None
    """[B, H, D], positive, in at least float32: the size of each channel, for a selector that scales channels."""

    @property
    def sizes(self) -> Tensor:
        """int64 [B, H, U], tokens of each unit; computed when asked for. Behind `num_units` it means nothing."""
        return (self.offsets[..., 1 : self.max_units + 1] - self.offsets[..., : self.max_units]).long()

    def of_rows(self, numbers: Tensor, reduction: Literal["mean", "amax"] = "mean") -> Tensor:
        """One number for each unit from those of its rows; floating point [B, H, R] to [B, H, U], -inf where there is
        no unit."""
        columns = torch.arange(self.max_units + 1, device=numbers.device)
        num_rows, num_units = numbers.shape[-1], self.num_units[..., None]
        # What lies behind the last unit's end means nothing, and a search needs ascending bounds.
        bounds = self.offsets[..., : self.max_units + 1].masked_fill(columns > num_units, num_rows)
        rows = torch.arange(num_rows, dtype=bounds.dtype, device=numbers.device).expand_as(numbers).contiguous()
        unit = torch.searchsorted(bounds, rows, right=True) - 1
        # The last column collects the rows of no unit.
        unit = torch.where((unit >= 0) & (unit < num_units), unit, self.max_units)
        found = numbers.new_full((*numbers.shape[:2], self.max_units + 1), -math.inf)
        found = found.scatter_reduce(-1, unit, numbers, reduction, include_self=False)[..., : self.max_units]
        return found.masked_fill(columns[:-1] >= num_units, -math.inf)


@frozen(kw_only=True, eq=False)
class LeavingUnits:
    """The unit of each head that leaves the window in this step, where one does; its tokens are still there."""

    leaves: Tensor
    """bool [B, H]: the heads that have one."""
    column: Tensor
    """int64 [B, H]: its number, and so its column of the index."""
    start: Tensor
    """int64 [B, H]: its first position."""
    size: Tensor
    """int64 [B, H]: its tokens; at most `max_size`. Like `column` and `start`, it means something where `leaves`."""
    max_size: int
    keys: Tensor
    """[B, H, N, D]: the token at position p lies at `ring_first + p % ring_size`."""
    values: Tensor
    """[B, H, N, Dv], likewise."""
    ring_first: int
    ring_size: int
    notes: Tensor | None = None
    """float32 [F, B, H, R], what the scorer has noted of every token, by row; None for a scorer that takes no notes."""

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [B * H, max_size, D], values [B * H, max_size, Dv] and unit ids int64 [B * H, max_size]: 0 for a token
        of the unit, 1 behind its last."""
        steps = torch.arange(self.max_size, device=self.start.device)
        place = (self.ring_first + (self.start[..., None] + steps) % self.ring_size)[..., None]
        keys = self.keys.gather(2, place.expand(-1, -1, -1, self.keys.shape[-1]))
        values = self.values.gather(2, place.expand(-1, -1, -1, self.values.shape[-1]))
        unit_ids = (steps >= self.size[..., None]).long()
        return keys.flatten(0, 1), values.flatten(0, 1), unit_ids.flatten(0, 1)

    def noted(self) -> Tensor | None:
        """Notes of the same tokens, [F, B * H, max_size]."""
        if self.notes is None:
            return None
        steps = torch.arange(self.max_size, device=self.start.device)
        row = (self.start[..., None] + steps).clamp(max=self.notes.shape[-1] - 1)
        return self.notes.gather(-1, row.expand(self.notes.shape[0], *row.shape)).flatten(1, 2)


class Invariant(Enum):
    """What a policy can promise. A stage that cannot keep one lists it in `waives`."""

    UNITS_DISJOINT = "units are disjoint and cover every token that left the window"
    NO_TOKEN_LOST = "no token is lost, and none is attended twice"
    EXACT_BUDGET = "a selection fills the budget exactly when there is enough to take"
    ALWAYS_ATTENDED = "sinks and window are attended at every step"
    BYTES_COUNTED = "the bytes counted are the bytes moved"
    RESIDENT_STAYS = "a row that is resident is never moved again"
    RESET_REPEATS = "a second run on a reset cache equals the first"
    ROW_INDEPENDENT = "a row's result depends neither on its neighbours in the batch nor on padding"
    EXACT_KV = "keys and values come back from the store as they were"
    ATTENDED_ONLY = "attention sees the attended tokens and nothing else"
