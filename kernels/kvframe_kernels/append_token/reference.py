"""Plain torch definitions of `append_token` and of its parts.

The counters of one layer are one tensor, int64 [NUM_COUNTS, B, H]: a kernel takes one pointer, and one addition
accumulates all of them for the report.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LENGTH = 0  # tokens of the row so far; the next token's position
SINKS = 1  # tokens held as sinks
RESIDENT = 2  # recalled or kept rows in the resident slots
WINDOW = 3  # tokens held in the ring: all since the start of the oldest unit that has not left
OPEN = 4  # tokens of the open unit
UNITS = 5  # units that have left the window and are in the index
CLOSED = 6  # units with a fixed end; those from UNITS on still lie in the window
NUM_COUNTS = 7


class Slots(NamedTuple):
    """The attention slots of one layer: sinks | resident | ring."""

    keys: Tensor
    """[B, H, N, D]"""
    values: Tensor
    """[B, H, N, Dv]"""
    bias: Tensor
    """[B, H, N], 0 in a slot that holds something, -inf in an empty one."""
    resident_rows: Tensor
    """int64 [B, H, C], the row in each resident slot, -1 in an empty one."""
    sink_size: int

    @property
    def ring_first(self) -> int:
        """Where the ring begins."""
        return self.sink_size + self.resident_rows.shape[-1]

    @property
    def ring_size(self) -> int:
        """Slots of the ring."""
        return self.bias.shape[-1] - self.ring_first

    def place(self, positions: Tensor) -> Tensor:
        """The slot of a sink or of a token in the window."""
        in_ring = self.ring_first + positions % self.ring_size
        return torch.where(positions < self.sink_size, positions, in_ring)


class Appended(NamedTuple):
    """What one token changed, [B, H] each; `column`, `start` and `size` mean something only where `leaves`."""

    position: Tensor
    """int64, of the token."""
    leaves: Tensor
    """bool, heads whose oldest unit left the window."""
    column: Tensor
    """int64, that unit's number."""
    start: Tensor
    """int64, its first position."""
    size: Tensor
    """int64, its tokens."""


def append_token_reference(
    counts: Tensor,
    unit_offsets: Tensor,
    cut: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Slots,
    finite: Tensor | None,
    *,
    window_size: int,
    min_size: int,
    max_size: int,
) -> Appended:
    """Take one token of every head in, in place: ledger, ring, and the unit that leaves the window with it.

    keys: [B, H, D], values: [B, H, Dv]; counts, unit_offsets, cut: as in `advance_ledger_reference`.
    finite: bool [B, H], set to False for a head whose key or value is not finite; None where the caller has looked.
    """
    if finite is not None:
        finite &= torch.isfinite(keys).all(-1) & torch.isfinite(values).all(-1)
    position = counts[LENGTH].clone()
    advance_ledger_reference(counts, unit_offsets, cut, min_size, max_size, slots.sink_size)
    place = slots.place(position)[..., None]
    slots.bias.scatter_(2, place, 0.0)
    place = place[..., None]
    slots.keys.scatter_(2, place.expand(-1, -1, -1, keys.shape[-1]), keys[:, :, None])
    slots.values.scatter_(2, place.expand(-1, -1, -1, values.shape[-1]), values[:, :, None])
    leaves, start, size = find_leaving_reference(counts, unit_offsets, window_size)
    column = counts[UNITS].clone()
    leave_window_reference(counts, slots, leaves, start, size, max_size)
    return Appended(position, leaves, column, start, size)


def advance_ledger_reference(
    counts: Tensor, unit_offsets: Tensor, cut: Tensor | None, min_size: int, max_size: int, sink_size: int
) -> None:
    """Close the open unit where that is due or where it is full, then take one token in; in place.

    counts: int64 [NUM_COUNTS, B, H]; unit_offsets: int32 or int64 [B, H, max_units + 2], closed unit u is the rows
    [unit_offsets[u], unit_offsets[u + 1]); the last entry takes the proposal behind the last unit there is room for.
    cut: bool [B, H], a boundary before this token; it closes the unit only if that holds `min_size` tokens, otherwise
    the unit goes on growing. None where nothing is due anywhere.
    """
    length, sinks, window = counts[LENGTH], counts[SINKS], counts[WINDOW]
    open_size, closed = counts[OPEN], counts[CLOSED]
    close = open_size >= max_size
    if cut is not None:
        close |= cut & (open_size >= min_size)
    # Written everywhere: behind the last closed unit the entry is only a proposal, overwritten by the next step.
    unit_offsets.scatter_(-1, (closed + 1)[..., None], length[..., None].to(unit_offsets.dtype))
    closed += close
    open_size.masked_fill_(close, 0)
    is_sink = length < sink_size
    sinks += is_sink
    in_window = ~is_sink
    window += in_window
    open_size += in_window
    length += 1


def find_leaving_reference(
    counts: Tensor, unit_offsets: Tensor, window_size: int, length: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The oldest closed unit of each head, where all of it lies before the last `window_size` tokens.

    `length` [B, H] replaces the ledger's own where the caller makes room for tokens that are about to come.
    Returns (leaves bool, start int64, size int64), [B, H] each; start and size mean something only where `leaves`.
    """
    units = counts[UNITS]
    start = unit_offsets.gather(-1, units[..., None])[..., 0].long()
    end = unit_offsets.gather(-1, (units + 1).clamp(max=unit_offsets.shape[-1] - 1)[..., None])[..., 0].long()
    leaves = (units < counts[CLOSED]) & (end <= (counts[LENGTH] if length is None else length) - window_size)
    return leaves, start, end - start


def leave_window_reference(
    counts: Tensor, slots: Slots, leaves: Tensor, start: Tensor, size: Tensor, max_size: int
) -> None:
    """Where `leaves`, a unit goes out of the window into the index; its first tokens become resident while there is
    room."""
    if leaves.device.type == "cpu" and not bool(leaves.any()):
        return  # free to ask for there, and most steps end here
    capacity = slots.resident_rows.shape[-1]
    kept = torch.minimum(size, (capacity - counts[RESIDENT]).clamp(min=0)) * leaves
    positions = start[..., None] + torch.arange(max_size, device=start.device)
    places = slots.place(positions)
    inside = leaves[..., None] & (positions < (start + size)[..., None])
    slots.bias.scatter_(2, places, slots.bias.gather(2, places).masked_fill_(inside, -math.inf))
    if capacity:
        _keep(slots, positions, places, inside & (positions < (start + kept)[..., None]))
    counts[UNITS] += leaves
    counts[WINDOW] -= size * leaves
    counts[RESIDENT] += kept


def _keep(slots: Slots, positions: Tensor, places: Tensor, kept: Tensor) -> None:
    """The i-th kept position goes to the i-th free resident slot; [B, H, max_size] each."""
    free = slots.resident_rows < 0
    # Slots in the order of being free: the first ones are those that take a row.
    ranked = (~free).to(torch.uint8).sort(dim=-1, stable=True).indices
    taken = torch.where(kept, kept.cumsum(-1) - 1, 0).clamp(max=free.shape[-1] - 1)
    batch, head, entry = kept.nonzero(as_tuple=True)
    slot = ranked[batch, head, taken[batch, head, entry]]
    source = places[batch, head, entry]
    slots.resident_rows[batch, head, slot] = positions[batch, head, entry]
    slot = slot + slots.sink_size
    slots.keys[batch, head, slot] = slots.keys[batch, head, source]
    slots.values[batch, head, slot] = slots.values[batch, head, source]
    slots.bias[batch, head, slot] = 0.0
