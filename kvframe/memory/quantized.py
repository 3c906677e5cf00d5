"""A host pool of rows in a few bits."""

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from kvframe.memory.codec import Codec
from kvframe.memory.pool import RowPool, RowStore, Traffic
from kvframe.quantization import Rounded, restore, round_groups
from kvframe.types import LayerLayout
from kvframe_kernels.packing import pack, packed_size, unpack

# Kernels move vectors of 16 bytes, and heads whose width is a multiple of 16 numbers.
_LANES = 16
_LANE = torch.float16  # only a width: what lies in a lane is codes


def _grouped(part: Tensor, num_groups: int) -> Tensor:
    """[..., N] to [..., num_groups, N / num_groups]."""
    return part.reshape(*part.shape[:-1], num_groups, part.shape[-1] // num_groups)


@frozen(kw_only=True, eq=False)
class KiviCodec(Codec):
    """Keys rounded per channel, values per token, as in KIVI (2024, arXiv 2402.02750).

    Per channel needs tokens to form groups with: in a prompt block every `group_size` rows, in unit order, are one.
    What is left over, and tokens that come one by one, are rounded per token, keys and values alike, in groups of
    `group_size` channels.

    An encoded row is the codes of the key, those of the value, and step and least of their groups of channels.
    """

    layout: LayerLayout
    bits: int
    group_size: int

    def _widths(self) -> tuple[int, int]:
        return self.layout.head_dim, self.layout.value_dim

    def _groups(self, width: int) -> int:
        """Groups of channels; one where they cannot be equal."""
        return width // self.group_size if width % self.group_size == 0 else 1

    @property
    def num_lanes(self) -> int:
        """Numbers of 2 bytes that an encoded row takes."""
        codes = sum(packed_size(width, self.bits) for width in self._widths())
        scales = sum(2 * self._groups(width) * self.layout.dtype.itemsize for width in self._widths())
        lanes = -(-(codes + scales) // _LANE.itemsize)
        return max(2 * _LANES, -(-lanes // _LANES) * _LANES)

    @property
    def encoded_layout(self) -> LayerLayout:
        """A layer whose rows are encoded ones, cut where a kernel may cut them."""
        return evolve(self.layout, head_dim=self.num_lanes - _LANES, value_dim=_LANES, dtype=_LANE)

    # ---- round trips ------------------------------------------------------------------------------------------------

    def block(self, rows: Tensor) -> Tensor:
        encoded, grouped = self.encode_block(rows)
        num_grouped = grouped.shape[1] * self.group_size
        per_token = self.decode(encoded)
        keys = per_token[..., : self.layout.head_dim]
        keys[:, :num_grouped] = self.restore_groups(self.codes(encoded[:, :num_grouped])[0], grouped)
        return per_token

    def tokens(self, rows: Tensor) -> Tensor:
        return self.decode(self.encode(rows))

    # ---- rows on their own ------------------------------------------------------------------------------------------

    def encode(self, rows: Tensor) -> Tensor:
        """Rows [..., D + Dv], each on its own, to lanes [..., num_lanes]."""
        parts = [self._round_token(part) for part in torch.split(rows, list(self._widths()), -1)]
        return self._join([part.codes.flatten(-2) for part in parts], parts)

    def _round_token(self, part: Tensor) -> Rounded:
        return round_groups(_grouped(part, self._groups(part.shape[-1])), self.bits)

    def _join(self, codes: list[Tensor], scales: list[Rounded]) -> Tensor:
        pieces = [pack(part, self.bits) for part in codes]
        for part in scales:
            pieces += [number.flatten(-2).contiguous().view(torch.uint8) for number in (part.step, part.least)]
        joined = torch.cat(pieces, -1)
        padding = self.num_lanes * _LANE.itemsize - joined.shape[-1]
        return torch.nn.functional.pad(joined, (0, padding)).view(_LANE)

    def codes(self, lanes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of encoded rows: codes of the key [..., D] and of the value [..., Dv], and the bytes of their scales."""
        sizes = [packed_size(width, self.bits) for width in self._widths()]
        joined = lanes.contiguous().view(torch.uint8)
        keys, values, scales = torch.split(joined, [*sizes, joined.shape[-1] - sum(sizes)], -1)
        head_dim, value_dim = self._widths()
        return unpack(keys, self.bits, head_dim), unpack(values, self.bits, value_dim), scales

    def decode(self, lanes: Tensor) -> Tensor:
        """Encoded rows, each on its own, to rows [..., D + Dv]."""
        *codes, scales = self.codes(lanes)
        restored = []
        first, size = 0, self.layout.dtype.itemsize
        for part in codes:
            groups = self._groups(part.shape[-1])
            numbers = []
            for _ in range(2):
                own = scales[..., first : first + groups * size].clone()  # at an address that a number may have
                numbers.append(own.view(self.layout.dtype)[..., None])
                first += groups * size
            rounded = Rounded(_grouped(part, groups), *numbers)
            restored.append(rounded.restore().flatten(-2))
        return torch.cat(restored, -1)

    # ---- groups of a prompt block ----------------------------------------------------------------------------------

    def encode_block(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [H, n, D + Dv] to lanes [H, n, num_lanes], and step and least of every full group of rows and channel:
        [H, n // group_size, 2, D]. Codes of keys in these groups are to be read with those."""
        head_dim, _ = self._widths()
        lanes = self.encode(rows)
        num_groups = rows.shape[1] // self.group_size
        num_grouped = num_groups * self.group_size
        if num_groups == 0:
            return lanes, rows.new_zeros(rows.shape[0], 0, 2, head_dim)
        grouped = rows[:, :num_grouped, :head_dim].reshape(-1, num_groups, self.group_size, head_dim)
        rounded = round_groups(grouped.transpose(2, 3), self.bits)  # over the rows of a group
        codes = rounded.codes.transpose(2, 3).flatten(1, 2)
        own = lanes[:, :num_grouped].contiguous().view(torch.uint8)
        own[..., : packed_size(head_dim, self.bits)] = pack(codes, self.bits)
        lanes[:, :num_grouped] = own.view(_LANE)
        return lanes, torch.stack([rounded.step[..., 0], rounded.least[..., 0]], 2)

    def restore_groups(self, codes: Tensor, grouped: Tensor) -> Tensor:
        """Keys [H, groups * group_size, D] of codes of full groups, one behind the other."""
        step, least = grouped.repeat_interleave(self.group_size, 1).unbind(2)
        return restore(codes, step, least)


@frozen(kw_only=True, eq=False)
class _Groups:
    """Which rows of a layer were rounded in groups, on the device."""

    of_row: Tensor  # int32 [B, H, R], the group of a row, -1 for none
    scales: Tensor = field()  # [B, H, groups, 2, D]


class QuantizedPool(RowStore):
    """Encoded rows in host memory; what is read or recalled is decoded on the device."""

    def __init__(self, layout: LayerLayout, num_rows: int, codec: KiviCodec) -> None:
        self._layout = layout
        self._codec = codec
        self._pool = RowPool(codec.encoded_layout, num_rows, torch.device("cpu"), crosses_link=True)
        self._groups = self._make_groups(num_rows)

    def _make_groups(self, num_rows: int) -> _Groups:
        layout = self._layout
        # Groups do not overlap, so that of all that begin in the same `group_size` rows there is one.
        num_groups = -(-num_rows // self._codec.group_size)
        heads = (layout.batch_size, layout.num_kv_heads)
        return _Groups(
            of_row=torch.full((*heads, num_rows), -1, dtype=torch.int32, device=layout.device),
            scales=torch.zeros(*heads, num_groups, 2, layout.head_dim, dtype=layout.dtype, device=layout.device),
        )

    @property
    def traffic(self) -> Traffic:  # type: ignore[override]  # that of the encoded rows
        return self._pool.traffic

    @property
    def num_rows(self) -> int:
        return self._pool.num_rows

    def grow(self, num_rows: int) -> None:
        self._pool.grow(num_rows)
        before, self._groups = self._groups, self._make_groups(self._pool.num_rows)
        self._groups.of_row[:, :, : before.of_row.shape[2]] = before.of_row
        self._groups.scales[:, :, : before.scales.shape[2]] = before.scales

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def stage(self, num_tokens: int) -> Tensor:
        layout = self._layout
        shape = (layout.num_kv_heads, num_tokens, layout.head_dim + layout.value_dim)
        return torch.empty(shape, dtype=layout.dtype, device=layout.device)

    def write(self, batch: int, start: int, rows: Tensor) -> None:
        lanes, grouped = self._codec.encode_block(rows)
        num_groups, size = grouped.shape[1], self._codec.group_size
        firsts = torch.arange(num_groups, device=rows.device) * size + start
        groups = firsts // size
        self._groups.scales[batch, :, groups] = grouped
        self._groups.of_row[batch, :, start : start + rows.shape[1]] = -1
        own = slice(start, start + num_groups * size)
        self._groups.of_row[batch, :, own] = groups.to(torch.int32).repeat_interleave(size)
        self._send(batch, start, lanes)

    def write_recent(self, batch: int, start: int, rows: Tensor) -> None:
        self._groups.of_row[batch, :, start : start + rows.shape[1]] = -1
        self._send(batch, start, self._codec.encode(rows))

    def _send(self, batch: int, start: int, lanes: Tensor) -> None:
        staged = self._pool.stage(lanes.shape[1])
        # Lanes are no numbers: they are copied as bytes, whatever they look like.
        staged.view(torch.int16).copy_(lanes.view(torch.int16))
        self._pool.write(batch, start, staged)

    def finish_writes(self) -> None:
        self._pool.finish_writes()

    def prefetch(self, batch: int, stop: int, room: int = 0) -> None:
        self._pool.prefetch(batch, stop)

    def read(self, batch: int, stop: int, room: int = 0) -> Tensor:
        rows = self.stage(stop + room)
        lanes = self._pool.read(batch, stop)
        places = torch.arange(stop, device=lanes.device).expand(lanes.shape[0], -1)
        rows[:, :stop] = self._decode(lanes[None], places[None], slice(batch, batch + 1))[0]
        return rows

    def read_range(self, batch: int, start: int, stop: int) -> Tensor:
        lanes = self._pool.read_range(batch, start, stop)
        places = torch.arange(start, stop, device=lanes.device).expand(lanes.shape[0], -1)
        return self._decode(lanes[None], places[None], slice(batch, batch + 1))[0]

    def _decode(self, lanes: Tensor, rows: Tensor, batches: slice) -> Tensor:
        """Encoded rows [B, H, n, lanes] of row numbers [B, H, n] as keys and values side by side."""
        decoded = self._codec.decode(lanes)
        width = self._layout.head_dim
        of_row, scales = self._groups.of_row[batches], self._groups.scales[batches]
        group = of_row.gather(2, rows.clamp(min=0)).long()
        found = scales.gather(2, group.clamp(min=0)[..., None, None].expand(*group.shape, 2, width))
        together = restore(self._codec.codes(lanes)[0], *found.unbind(3))
        keys = torch.where((group >= 0)[..., None], together, decoded[..., :width])
        return torch.cat([keys, decoded[..., width:]], -1)

    # ---- decoding ---------------------------------------------------------------------------------------------------

    def append(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        # A row that a prompt's block had before a reset, or a crop, may be a token of its own now.
        self._groups.of_row.scatter_(2, rows[..., None], -1)
        lanes = self._codec.encode(torch.cat([keys, values], -1))
        self._pool.append(rows, lanes[..., :-_LANES], lanes[..., -_LANES:])

    def recall(self, incoming: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
        shape = (*incoming.shape, self._codec.num_lanes - _LANES)
        first = torch.zeros(shape, dtype=_LANE, device=incoming.device)
        second = torch.zeros(*incoming.shape, _LANES, dtype=_LANE, device=incoming.device)
        self._pool.recall(incoming, first, second)
        decoded = self._decode(torch.cat([first, second], -1), incoming, slice(None))
        came = (incoming >= 0)[..., None]
        width = self._layout.head_dim
        k_slots.copy_(torch.where(came, decoded[..., :width], k_slots))
        v_slots.copy_(torch.where(came, decoded[..., width:], v_slots))

    # ---- the whole --------------------------------------------------------------------------------------------------

    def device_bytes(self) -> int:
        return self._groups.of_row.nbytes + self._groups.scales.nbytes

    def host_bytes(self) -> int:
        return self._pool.host_bytes()
