"""Who lies where: the counters and unit boundaries of one layer."""

import torch
from torch import Tensor

from kvframe.memory.mailbox import DeviceReport
from kvframe.types import LayerLayout, Units
from kvframe_kernels.append_token import (
    CLOSED,
    LENGTH,
    NUM_COUNTS,
    OPEN,
    RESIDENT,
    SINKS,
    UNITS,
    WINDOW,
    advance_ledger,
    find_leaving,
)


class Ledger:
    """Counters and unit boundaries, device tensors throughout; whatever depends on data is read by nobody on the host.

    Only the number of tokens of each sequence is known to the host as well: one more for every token.

    Units tile the rows from the sinks to the window without a gap, so that one offset a unit says where it lies. Units
    of index [0, UNITS) have left the window and can be selected, those of [UNITS, CLOSED) have a fixed end but still
    lie in the window, and the open unit takes the next token. While a prompt is read, the open unit is all of the
    window that is not yet cut; `begin_decode` cuts it.
    """

    def __init__(self, layout: LayerLayout, *, sink_size: int, window_size: int, min_size: int, max_size: int) -> None:
        self.layout = layout
        self.sink_size = sink_size
        self.window_size = window_size
        self.min_size = min_size
        self.max_size = max_size
        heads = (layout.batch_size, layout.num_kv_heads)
        self.counts = torch.zeros(NUM_COUNTS, *heads, dtype=torch.int64, device=layout.device)
        # Half the size of what torch indexes with: there is an offset for each of a long prompt's units.
        self.unit_offsets = torch.zeros(*heads, 2, dtype=torch.int32, device=layout.device)
        self.unit_offsets[..., 0] = sink_size
        self.is_prompt_unit = torch.zeros(*heads, 1, dtype=torch.bool, device=layout.device)
        self.lengths = [0] * layout.batch_size
        self.open_starts = [sink_size] * layout.batch_size  # of the uncut part, while a prompt is read
        self.in_prompt = True
        self._has_decoded = False
        self._most_closed = [0] * layout.batch_size  # at least what `counts` says, while a prompt is read
        self._report = DeviceReport(layout.device)
        self.end_prompt()
        self._has_decoded = False

    @property
    def has_decoded(self) -> bool:
        """Whether units of generated tokens may still lie in the window."""
        return self._has_decoded

    @property
    def max_units(self) -> int:
        """Units there is room for."""
        return self.is_prompt_unit.shape[-1] - 1

    def reserve_units(self, num_units: int) -> None:
        """Make room for at least this many units a head."""
        missing = num_units - self.max_units
        if missing > 0:
            heads = self.unit_offsets.shape[:2]
            self.unit_offsets = torch.cat([self.unit_offsets, self.unit_offsets.new_zeros(*heads, missing)], -1)
            self.is_prompt_unit = torch.cat([self.is_prompt_unit, self.is_prompt_unit.new_zeros(*heads, missing)], -1)

    def fit_units(self, num_units: int) -> None:
        """Have room for just this many units a head."""
        if num_units < self.max_units:
            self.unit_offsets = self.unit_offsets[..., : num_units + 2].clone()
            self.is_prompt_unit = self.is_prompt_unit[..., : num_units + 1].clone()
        self.reserve_units(num_units)

    def begin_prompt(self) -> None:
        """A prompt chunk or a turn's text comes: what was generated ends a unit here, whatever its size.

        Reads the device where something was generated.
        """
        if self.in_prompt:
            return
        self.in_prompt = True
        counts = self.counts
        self.unit_offsets.scatter_(-1, (counts[CLOSED] + 1)[..., None], counts[LENGTH][..., None].int())
        counts[CLOSED] += counts[OPEN] > 0
        counts[OPEN].zero_()
        self.open_starts = [max(length, self.sink_size) for length in self.lengths]
        self._most_closed = counts[CLOSED].amax(-1).tolist()

    def prompt_block(self, batch: int, num_tokens: int) -> tuple[int, int]:
        """Positions [start, stop) of one sequence that leave the window as prompt units when `num_tokens` more come."""
        start = self.open_starts[batch]
        return start, max(start, self.lengths[batch] + num_tokens - self.window_size)

    def add_prompt_units(self, batch: int, start: int, units: Units) -> Tensor:
        """Enter the units of a prompt block; returns int64 [H, U], the index column of each."""
        num_units = units.sizes.shape[-1]
        first = self.counts[CLOSED, batch]
        columns = first[:, None] + torch.arange(num_units, device=first.device)
        ends = start + units.sizes.cumsum(-1)
        heads = torch.arange(columns.shape[0], device=columns.device)[:, None]
        self.unit_offsets[batch, heads, columns + 1] = ends.int()
        self.is_prompt_unit[batch, heads, columns] = units.sizes > 0
        self.counts[CLOSED, batch] += units.num_units
        self.counts[UNITS, batch] += units.num_units
        self._most_closed[batch] += num_units
        return columns

    def end_prompt(self) -> None:
        """The prompt may be over: have the device say how many units there are, for `begin_decode`."""
        self._report.ask(self.counts[CLOSED].amax(-1))

    def finish_prompt(self, batch: int, num_tokens: int, block_stop: int) -> None:
        """`num_tokens` more tokens of one sequence are stored; its window starts at `block_stop` or at an older
        unit."""
        self.lengths[batch] += num_tokens
        self.open_starts[batch] = block_stop
        length, counts = self.lengths[batch], self.counts[:, batch]
        pending = self.unit_offsets[batch].gather(-1, counts[UNITS][:, None])[:, 0]
        window_start = torch.where(counts[UNITS] < counts[CLOSED], pending, block_stop)
        counts[LENGTH] = length
        counts[SINKS] = min(length, self.sink_size)
        counts[OPEN] = max(0, length - block_stop)
        counts[WINDOW] = (length - window_start).clamp(min=0)

    def most_units(self, capacity: int) -> tuple[int, int]:
        """The most units of a head once every sequence has `capacity` tokens: closed ones, and those of them that have
        left the window and so need a place in the index. The host waits until it is known how many there are."""
        most_closed = most_left = 0
        for closed, length, start in zip(self.closed_at_end(), self.lengths, self.open_starts, strict=True):
            # Of what is not cut yet, full units first; then nobody closes a unit before it has `min_size` tokens.
            full = max(0, length - start) // self.max_size
            cut = start + full * self.max_size
            most_closed = max(most_closed, closed + full + max(0, capacity - cut) // self.min_size)
            left = max(0, capacity - self.window_size - cut) // self.min_size
            most_left = max(most_left, closed + full + left)
        return most_closed, most_left

    def begin_decode(self) -> None:
        """The prompt is over: cut what of it lies in the window into full units; the rest stays open."""
        if not self.in_prompt:
            return
        self.in_prompt = False
        self._has_decoded = True
        self._most_closed = self.closed_at_end()
        for batch, (length, start) in enumerate(zip(self.lengths, self.open_starts, strict=True)):
            full = max(0, length - start) // self.max_size
            closed = self.counts[CLOSED, batch]
            steps = torch.arange(1, full + 1, device=closed.device)
            heads = torch.arange(closed.shape[0], device=closed.device)[:, None]
            self.unit_offsets[batch, heads, closed[:, None] + steps] = (start + steps * self.max_size).int()
            closed += full
            self._most_closed[batch] += full
            self.counts[OPEN, batch] -= full * self.max_size

    def close_open(self, batch: int) -> None:
        """The open unit of every head of one sequence ends here, whatever its size."""
        counts = self.counts[:, batch]
        self.unit_offsets[batch].scatter_(-1, (counts[CLOSED] + 1)[:, None], counts[LENGTH][:, None].int())
        counts[CLOSED] += counts[OPEN] > 0
        counts[OPEN].zero_()

    def regroup(self, batch: int, start: int, stop: int, units: Units) -> tuple[Tensor, Tensor, Tensor]:
        """The units of the rows [start, stop) of one sequence, all of them in the index, are replaced by others.

        Both bounds are bounds of units in every head, and the rows lie in the new units' order already.
        Returns (first int64 [H], sources int64 [H, columns], is_new bool [H, columns]): the first replaced column; for
        every column of the index, where what is in it now was before; and whether it is one of the new ones.
        """
        offsets, counts = self.unit_offsets[batch], self.counts[:, batch]
        columns = torch.arange(offsets.shape[1], device=offsets.device)
        # Behind the last closed unit there is no order.
        bounds = offsets.masked_fill(columns > counts[CLOSED][:, None], torch.iinfo(offsets.dtype).max)
        # Filled rather than copied: a copy of a list would make the host wait for the device.
        edges = torch.full((offsets.shape[0], 2), start, dtype=offsets.dtype, device=offsets.device)
        edges[:, 1] = stop
        first, behind = torch.searchsorted(bounds, edges).unbind(-1)
        more = units.num_units - (behind - first)
        past = columns - first[:, None]  # columns past the first that is replaced
        ends = start + units.sizes.cumsum(-1)
        sources = torch.where(past > 0, columns - more[:, None], columns).clamp(0, offsets.shape[1] - 1)
        inside = (past > 0) & (past <= units.num_units[:, None])
        fresh = ends.gather(1, (past - 1).clamp(0, ends.shape[1] - 1))
        offsets.copy_(torch.where(inside, fresh, offsets.gather(1, sources).long()))
        is_new = (past >= 0) & (past < units.num_units[:, None])
        sources = torch.where(past >= units.num_units[:, None], columns - more[:, None], columns)
        sources = sources.clamp(0, offsets.shape[1] - 1)
        flags = self.is_prompt_unit[batch]
        width = flags.shape[1]
        flags.copy_(flags.gather(1, sources[:, :width].clamp(max=width - 1)) & ~is_new[:, :width])
        counts[CLOSED] += more
        counts[UNITS] += more
        return first, sources, is_new

    def advance(self, cut: Tensor | None) -> None:
        """Take one token of every sequence in; `cut` bool [B, H] ends the open unit before it.

        `count_token` tells the host.
        """
        advance_ledger(self.counts, self.unit_offsets, cut, self.min_size, self.max_size, self.sink_size)

    def count_token(self) -> None:
        """One token of every sequence has been taken in; what the host knows of that."""
        self.lengths = [length + 1 for length in self.lengths]

    def leaving(self, length: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(leaves, start, size), [B, H] each: the oldest unit of each head that lies before the window."""
        return find_leaving(self.counts, self.unit_offsets, self.window_size, length)

    def release(self, leaves: Tensor, size: Tensor, kept: Tensor) -> None:
        """Units of `size` tokens belong to the index now where `leaves`; `kept` of their tokens became resident."""
        self.counts[UNITS] += leaves
        self.counts[WINDOW] -= size * leaves
        self.counts[RESIDENT] += kept * leaves

    @property
    def num_units(self) -> Tensor:
        """int64 [B, H], units that can be selected."""
        return self.counts[UNITS]

    @property
    def num_closed(self) -> Tensor:
        """int64 [B, H], units with a fixed end, in the index or still in the window."""
        return self.counts[CLOSED]

    def most_closed(self, batch: int) -> int:
        """No head of a sequence has more closed units; known while a prompt is read."""
        return self._most_closed[batch]

    def closed_at_end(self) -> list[int]:
        """The most closed units of every sequence when `end_prompt` was called; the host waits until it is known."""
        return self._report.answer()

    @property
    def sinks(self) -> Tensor:
        """int64 [B, H], tokens held as sinks."""
        return self.counts[SINKS]

    @property
    def window(self) -> Tensor:
        """int64 [B, H], tokens held in the window."""
        return self.counts[WINDOW]

    @property
    def resident(self) -> Tensor:
        """int64 [B, H], rows in the resident slots."""
        return self.counts[RESIDENT]

    def visible_units(self) -> int:
        """Columns of the index worth reading: exact where the host may look for free, otherwise all there is room
        for."""
        if self.layout.device.type == "cpu":
            return int(self.counts[UNITS].max())
        return self.max_units

    def reset(self) -> None:
        """As at the start, in place."""
        self.counts.zero_()
        self.unit_offsets.zero_()
        self.unit_offsets[..., 0] = self.sink_size
        self.is_prompt_unit.zero_()
        self.lengths = [0] * self.layout.batch_size
        self.open_starts = [self.sink_size] * self.layout.batch_size
        self.in_prompt = True
        self._most_closed = [0] * self.layout.batch_size
        self.end_prompt()

    def nbytes(self) -> int:
        """Device memory held."""
        return self.counts.nbytes + self.unit_offsets.nbytes + self.is_prompt_unit.nbytes


__all__ = ["CLOSED", "LENGTH", "NUM_COUNTS", "OPEN", "RESIDENT", "SINKS", "UNITS", "WINDOW", "Ledger"]
