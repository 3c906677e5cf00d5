"""The memory of the `dense` and `shadow` executions: everything on the device, attention under a mask."""

import math

import torch
from torch import Tensor

from kvframe.memory.base import LayerMemory
from kvframe.memory.codec import Codec
from kvframe.memory.ledger import LENGTH, RESIDENT, Ledger
from kvframe.memory.pool import Traffic
from kvframe.types import Candidates, LayerLayout, LeavingUnits, UnitTable
from kvframe_kernels.select_units import ROWS_RECALLED, ROWS_SELECTED, SELECTIONS
from kvframe_kernels.slot_attention import Entries, slot_attention, slot_attention_reference


class DenseMemory(LayerMemory):
    """Keys and values [B, H, R, ...] by row, and a mask of the resident rows.

    Nothing here is clever: what attention sees is a mask over all rows, made from the ledger's counts. That makes it
    the standard against which `SlotMemory` is held.

    codec: how the store that this stands for keeps rows. Every row is then kept twice, as it was and as it would come
    back, and attention sees the latter of a row that was recalled.
    """

    def __init__(
        self, layout: LayerLayout, ledger: Ledger, num_rows: int, capacity: int, codec: Codec | None = None
    ) -> None:
        self._layout = layout
        self._capacity = capacity
        self._ledger = ledger
        self._codec = codec
        heads = (layout.batch_size, layout.num_kv_heads)
        self._head_ids = (
            torch.arange(layout.batch_size, device=layout.device)[:, None],
            torch.arange(layout.num_kv_heads, device=layout.device),
        )
        self.keys, self.values = layout.zeros(num_rows)
        self.resident = torch.zeros(*heads, num_rows, dtype=torch.bool, device=layout.device)
        self._stored = None if codec is None else torch.cat([self.keys, self.values], -1)  # as it would come back
        self._came_back = torch.zeros_like(self.resident)
        self._traffic = Traffic(row_bytes=0)

    @property
    def traffic(self) -> Traffic:
        return self._traffic

    def reserve(self, num_rows: int) -> None:
        missing = num_rows - self.keys.shape[2]
        if missing > 0:
            keys, values = self._layout.zeros(missing)
            self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
            more = self.resident.new_zeros(*self.resident.shape[:2], missing)
            self.resident = torch.cat([self.resident, more], 2)
            self._came_back = torch.cat([self._came_back, more], 2)
            if self._stored is not None:
                self._stored = torch.cat([self._stored, torch.cat([keys, values], -1)], 2)

    def _as_stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the store would give them back."""
        if self._stored is None:
            return self.keys, self.values
        width = self._layout.head_dim
        return self._stored[..., :width], self._stored[..., width:]

    def _as_seen(self) -> tuple[Tensor, Tensor]:
        """Keys and values as attention sees them."""
        if self._stored is None:
            return self.keys, self.values
        keys, values = self._as_stored()
        back = self._came_back[..., None]
        return torch.where(back, keys, self.keys), torch.where(back, values, self.values)

    def read(self, batch: int, stop: int, room: int = 0) -> Tensor:
        rows = self.stage(stop + room)
        keys, values = self._as_stored()
        rows[:, :stop] = torch.cat([keys[batch, :, :stop], values[batch, :, :stop]], -1)
        return rows

    def read_range(self, batch: int, start: int, stop: int) -> Tensor:
        return self.read(batch, stop)[:, start:].clone()

    def reorder(self, batch: int, start: int, order: Tensor, rows: Tensor) -> None:
        own = slice(start, start + order.shape[1])
        for tensor in (self.keys, self.values, self.resident, self._came_back):
            before = tensor[batch, :, own]
            places = order.view(*order.shape, *(1,) * (before.dim() - 2)).expand_as(before)
            tensor[batch, :, own] = before.gather(1, places)
        if self._codec is not None and self._stored is not None:
            self._stored[batch, :, own] = self._codec.block(rows)

    def recent(self, batch: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        # Clones, because a block may be written over the rows it was read from.
        return self.keys[batch, :, start:stop].clone(), self.values[batch, :, start:stop].clone()

    def stage(self, num_tokens: int) -> Tensor:
        layout = self._layout
        shape = (layout.num_kv_heads, num_tokens, layout.head_dim + layout.value_dim)
        return torch.empty(shape, dtype=layout.dtype, device=layout.device)

    def store_block(self, batch: int, start: int, rows: Tensor) -> None:
        self._write(batch, start, rows)
        if self._codec is not None and self._stored is not None:
            self._stored[batch, :, start : start + rows.shape[1]] = self._codec.block(rows)

    def store_recent(self, batch: int, start: int, keys: Tensor, values: Tensor) -> None:
        rows = torch.cat([keys, values], -1)
        self._write(batch, start, rows)
        if self._codec is not None and self._stored is not None:
            self._stored[batch, :, start : start + rows.shape[1]] = self._codec.tokens(rows)

    def _write(self, batch: int, start: int, rows: Tensor) -> None:
        width = self._layout.head_dim
        self.keys[batch, :, start : start + rows.shape[1]] = rows[..., :width]
        self.values[batch, :, start : start + rows.shape[1]] = rows[..., width:]

    def finish_prompt(self) -> None:
        pass

    def append(self, keys: Tensor, values: Tensor, cut: Tensor | None, finite: Tensor | None) -> LeavingUnits:
        ledger = self._ledger
        if finite is not None:
            finite &= torch.isfinite(keys).all(-1) & torch.isfinite(values).all(-1)
        ledger.advance(cut)
        # By index: scatter_ walks over all rows of a head on a CPU.
        row = (*self._head_ids, ledger.counts[LENGTH] - 1)
        self.keys[row], self.values[row] = keys, values
        if self._codec is not None and self._stored is not None:
            self._stored[row] = self._codec.tokens(torch.cat([keys, values], -1))
        return self._leave(*ledger.leaving())

    def leave(self, length: Tensor) -> LeavingUnits | None:
        leaves, start, size = self._ledger.leaving(length)
        return self._leave(leaves, start, size) if bool(leaves.any()) else None

    def _leave(self, leaves: Tensor, start: Tensor, size: Tensor) -> LeavingUnits:
        ledger, rows = self._ledger, self._rows()
        unit = LeavingUnits(
            leaves=leaves,
            column=ledger.num_units.clone(),
            start=start,
            size=size,
            max_size=ledger.max_size,
            keys=self.keys,
            values=self.values,
            ring_first=0,
            ring_size=self.keys.shape[2],
        )
        kept = torch.minimum(size, (self._capacity - ledger.resident).clamp(min=0))
        inside = (rows >= start[..., None]) & (rows < (start + kept)[..., None])
        self.resident |= inside & leaves[..., None]
        ledger.release(leaves, size, kept)
        return unit

    def _rows(self) -> Tensor:
        return torch.arange(self.keys.shape[2], device=self._layout.device)

    def recall(self, rows: Tensor, count: Tensor, due: Tensor, tallies: Tensor) -> None:
        wanted = torch.zeros_like(self.resident)
        # Where nothing is due, a kernel leaves whatever it finds in its memory.
        batch, head, entry = ((rows >= 0) & due[..., None]).nonzero(as_tuple=True)
        wanted[batch, head, rows[batch, head, entry]] = True
        tallies[SELECTIONS] += due
        tallies[ROWS_SELECTED] += count * due
        missing = wanted & ~self.resident & due[..., None]
        tallies[ROWS_RECALLED] += missing.sum(-1)
        self.resident = torch.where(due[..., None], wanted, self.resident)
        self._came_back = (self._came_back | missing) & self.resident
        counts = self._ledger.counts
        counts[RESIDENT] = torch.where(due, count, counts[RESIDENT])

    def attended(self) -> Tensor:
        """bool [B, H, R]: what attention sees."""
        return self.resident | self._kept()

    def _kept(self) -> Tensor:
        """bool [B, H, R]: sinks and window."""
        rows, ledger = self._rows(), self._ledger
        length = ledger.counts[LENGTH][..., None]
        recent = (rows >= length - ledger.window[..., None]) & (rows < length)
        return (rows < ledger.sinks[..., None]) | recent

    def attend(self, query: Tensor, tail: tuple[Tensor, Tensor] | None, entries: Entries | None = None) -> Tensor:
        return self._attend_where(self.attended(), query, self._as_seen(), tail, entries)

    def attend_to_all(self, query: Tensor, lengths: list[int]) -> Tensor:
        return self._attend_where(self._exists(), query, self._as_stored(), None)

    def _exists(self) -> Tensor:
        return (self._rows() < self._ledger.counts[LENGTH][..., None]).contiguous()

    def _attend_where(
        self,
        visible: Tensor,
        query: Tensor,
        states: tuple[Tensor, Tensor],
        tail: tuple[Tensor, Tensor] | None,
        entries: Entries | None = None,
    ) -> Tensor:
        """Attention over the rows of a mask [B, H, R], and causally over the tail."""
        (keys, values), bias = states, self._bias(visible)
        if tail is not None:
            keys, values = torch.cat([keys, tail[0]], 2), torch.cat([values, tail[1]], 2)
            num_queries, num_tail = query.shape[2], tail[0].shape[2]
            steps = torch.arange(num_tail, device=query.device)
            seen = steps < torch.arange(num_queries, device=query.device)[:, None]
            heads = bias.shape[:2]
            bias = torch.cat(
                [bias[:, :, None].expand(*heads, num_queries, -1), self._bias(seen).expand(*heads, -1, -1)], -1
            )
        return slot_attention(query, keys, values, bias, self._layout.sm_scale, entries=entries)[0]

    def weights(self, query: Tensor, full: Tensor | None, lengths: list[int]) -> Tensor:
        weights = self._weights_where(self.attended(), query, self._as_seen()[0])
        if full is None:
            return weights
        everywhere = self._weights_where(self._exists(), query, self._as_stored()[0])
        return torch.where(full[..., None, None], everywhere, weights)

    def kept_lse(self, query: Tensor) -> Tensor:
        return self._scores_where(self._kept(), query, self.keys).logsumexp(-1).flatten(1)

    def missed_share(self, candidates: Candidates) -> Tensor:
        exists = torch.arange(candidates.rows.shape[-1], device=self._layout.device) < candidates.count[..., None]
        missing = exists & ~self.resident.gather(-1, torch.where(exists, candidates.rows, 0))
        return candidates.shares.masked_fill(~missing, 0).amax(-1).clamp(min=0)

    def _weights_where(self, visible: Tensor, query: Tensor, keys: Tensor) -> Tensor:
        return self._scores_where(visible, query, keys).softmax(-1)

    def _scores_where(self, visible: Tensor, query: Tensor, keys: Tensor) -> Tensor:
        """Scaled scores [B, H, G, R] of a query [B, Hq, D] in at least float32, -inf for a row that is not visible."""
        layout = self._layout
        grouped = (query * layout.sm_scale).view(*visible.shape[:2], -1, layout.head_dim)
        scores = torch.matmul(grouped, keys.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32))
        return scores.masked_fill(~visible[:, :, None], -math.inf)

    def unattended(self, units: UnitTable) -> Tensor:
        before = torch.nn.functional.pad(self.resident.cumsum(-1), (1, 0))
        offsets = units.offsets[..., : units.max_units + 1].long().clamp(0, self.keys.shape[2])
        inside = before.gather(-1, offsets[..., 1:]) - before.gather(-1, offsets[..., :-1])
        columns = torch.arange(units.max_units, device=offsets.device)
        return (units.sizes - inside).masked_fill(columns >= units.num_units[..., None], 0)

    def _bias(self, visible: Tensor) -> Tensor:
        bias = torch.zeros(visible.shape, dtype=self._layout.dtype, device=self._layout.device)
        return bias.masked_fill(~visible, -math.inf)

    def attended_rows(self, batch: int, head: int) -> Tensor:
        return self.attended()[batch, head].nonzero()[:, 0].cpu()

    def reset(self) -> None:
        self.resident.zero_()
        self._came_back.zero_()

    def device_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.resident.nbytes

    def host_bytes(self) -> int:
        return 0


class ShadowMemory(DenseMemory):
    """Full attention drives; the policy is only watched.

    `captured_mass` and `oracle_recall` add up, over steps, the share of the full softmax that the attended rows hold,
    and the share of the oracle's rows (the top ones, as many as are attended) that are attended; mean over the query
    heads of a group.
    """

    def __init__(
        self, layout: LayerLayout, ledger: Ledger, num_rows: int, capacity: int, codec: Codec | None = None
    ) -> None:
        super().__init__(layout, ledger, num_rows, capacity, codec)
        heads = (layout.batch_size, layout.num_kv_heads)
        self.captured_mass = torch.zeros(heads, dtype=torch.float64, device=layout.device)
        self.oracle_recall = torch.zeros(heads, dtype=torch.float64, device=layout.device)

    def attend(self, query: Tensor, tail: tuple[Tensor, Tensor] | None, entries: Entries | None = None) -> Tensor:
        exists = self._exists()
        self._observe(query[:, :, :1], exists)
        return self._attend_where(exists, query, (self.keys, self.values), tail)

    def _observe(self, query: Tensor, stored: Tensor) -> None:
        attended = self.attended()
        scale = self._layout.sm_scale
        _, everything = slot_attention_reference(query, self.keys, self.values, self._bias(stored), scale)
        _, seen = slot_attention_reference(query, self.keys, self.values, self._bias(attended), scale)
        batch_size, num_kv_heads = attended.shape[:2]
        mass = (seen - everything).exp().view(batch_size, num_kv_heads, -1).mean(-1)
        grouped = (query * scale).reshape(batch_size, num_kv_heads, -1, self._layout.head_dim)
        scores = torch.matmul(grouped, self.keys.transpose(2, 3)).to(torch.promote_types(query.dtype, torch.float32))
        weights = scores.masked_fill(~stored[:, :, None], -math.inf).softmax(-1).mean(2)
        order = weights.masked_fill(~stored, -1.0).argsort(dim=-1, descending=True, stable=True)
        count = attended.sum(-1, keepdim=True)
        hits = attended.gather(-1, order) & (self._rows() < count)
        self.captured_mass += mass
        self.oracle_recall += hits.sum(-1).double() / count[..., 0]

    def clear_traffic(self) -> None:
        super().clear_traffic()
        self.captured_mass.zero_()
        self.oracle_recall.zero_()
