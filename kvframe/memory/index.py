"""What the device keeps for finding KV: the scorer's summaries of units, and what the selector keeps of rows."""

import torch
from torch import Tensor

from kvframe.memory.columns import Columns
from kvframe.stages.scorer import Scorer
from kvframe.stages.selector import Selector
from kvframe.types import LayerLayout, LeavingUnits
from kvframe_kernels.unit_index import unit_mean


class UnitIndex:
    """Named tensors [B, H, max_units + 1, ...]; the scorer says which, and there may be none."""

    def __init__(self, layout: LayerLayout, scorer: Scorer) -> None:
        no_keys = torch.zeros(1, 1, layout.head_dim, dtype=layout.dtype, device=layout.device)
        no_values = torch.zeros(1, 1, layout.value_dim, dtype=layout.dtype, device=layout.device)
        sample = scorer.index(no_keys, no_values, torch.zeros(1, 1, dtype=torch.int64, device=layout.device), 1)
        self._columns = Columns((layout.batch_size, layout.num_kv_heads), sample, 0)
        self._head_ids = torch.arange(layout.num_kv_heads, device=layout.device)
        self.max_units = 0
        """Units there is room for; counted, because a scorer may go by its notes alone and keep no tensors."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return self._columns.tensors

    def reserve(self, max_units: int) -> None:
        """Make room for at least this many units a head."""
        self.max_units = max(self.max_units, max_units)
        self._columns.reserve(max_units)

    def fit(self, max_units: int) -> None:
        """Have room for just this many units a head."""
        self.max_units = max_units
        self._columns.fit(max_units)

    def write(self, batch: int, columns: Tensor, entries: dict[str, Tensor]) -> None:
        """Entries [H, U, ...] of one sequence into columns [H, U]."""
        for name, entry in entries.items():
            self.tensors[name][batch, self._head_ids[:, None], columns] = entry

    def regroup(self, batch: int, sources: Tensor, entries: dict[str, Tensor], first: Tensor, is_new: Tensor) -> None:
        """Units of one sequence are replaced: column c of a head becomes the entry c - first of `entries` [H, K, ...]
        where `is_new` [H, columns], elsewhere what was in column sources[c]; in place."""
        for name, tensor in self.tensors.items():
            own, entry = tensor[batch], entries[name].to(tensor.dtype)
            num_columns = own.shape[1]
            columns = torch.arange(num_columns, device=own.device)
            fresh = (columns - first[:, None]).clamp(0, entry.shape[1] - 1)
            moved = sources[:, :num_columns].clamp(max=num_columns - 1)
            fresh, moved, new = (_spread(part, own) for part in (fresh, moved, is_new[:, :num_columns]))
            own.copy_(torch.where(new, entry.gather(1, fresh), own.gather(1, moved)))

    def view(self, num_units: int) -> dict[str, Tensor]:
        """The first `num_units` columns."""
        return {name: tensor[:, :, :num_units] for name, tensor in self.tensors.items()}

    def forget(self) -> None:
        """As at the start, in place."""
        self._columns.clear()

    def addresses(self) -> list[int]:
        """Where the tensors lie."""
        return [tensor.data_ptr() for tensor in self.tensors.values()]

    def nbytes(self) -> int:
        """Device memory held."""
        return self._columns.nbytes()


def _spread(places: Tensor, states: Tensor) -> Tensor:
    """[H, n] as [H, n, ...] of the trailing shape of `states`."""
    shape = (*places.shape, *states.shape[2:])
    return places.view(*places.shape, *(1,) * (states.dim() - 2)).expand(shape)


class RowIndex:
    """Named tensors [B, H, R + 1, ...]; the selector says which, and mostly there are none. The last row takes what
    belongs nowhere."""

    def __init__(self, layout: LayerLayout, selector: Selector, num_rows: int) -> None:
        keys, values = (states[:1, 0] for states in layout.zeros(1))
        self.channels: Tensor | None = None
        """[B, H, D], the size of each channel; None for a selector that does not ask."""
        heads = (layout.batch_size, layout.num_kv_heads)
        if selector.scales_channels:
            dtype = torch.promote_types(layout.dtype, torch.float32)
            self.channels = torch.ones(*heads, layout.head_dim, dtype=dtype, device=layout.device)
        sample = selector.row_index(keys, values, keys, None if self.channels is None else self.channels[0, :1])
        self._columns = Columns(heads, sample, num_rows)
        self._selector = selector
        self._has_rows = [False] * layout.batch_size

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        return self._columns.tensors

    def reserve(self, num_rows: int) -> None:
        """Make room for at least this many tokens a sequence."""
        self._columns.reserve(num_rows)

    def write(self, batch: int, start: int, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> None:
        """A prompt block in unit order; keys [H, n, D], values [H, n, Dv], and for each token its unit, int64
        [H, n]."""
        if not self.tensors:
            return
        centres = unit_mean(keys, unit_ids, num_units).gather(1, unit_ids[..., None].expand_as(keys))
        channels = None
        if self.channels is not None:
            channels = self.channels[batch]
            if not self._has_rows[batch]:
                channels.copy_(channel_sizes(keys - centres))
        self._has_rows[batch] = True
        for name, entry in self._selector.row_index(keys, values, centres, channels).items():
            self.tensors[name][batch, :, start : start + keys.shape[1]] = entry

    def begin_decode(self) -> None:
        """From here on units leave the window: whatever a channel's size is by then, it stays, because rows that are
        coded with it cannot be coded anew."""
        self._has_rows = [True] * len(self._has_rows)

    def forget(self) -> None:
        """Another text follows."""
        self._has_rows = [False] * len(self._has_rows)
        if self.channels is not None:
            self.channels.fill_(1)

    def extend(self, unit: LeavingUnits) -> None:
        """The unit of each head that leaves the window, where one does."""
        if self.tensors:
            self._selector.extend(self.tensors, unit, self.channels)

    def row_bytes(self) -> int:
        """Device memory of one row of every head."""
        return sum(tensor[:, :, :1].nbytes for tensor in self.tensors.values())

    def nbytes(self) -> int:
        """Device memory held."""
        return self._columns.nbytes() + (0 if self.channels is None else self.channels.nbytes)


def channel_sizes(states: Tensor) -> Tensor:
    """Root mean square of every channel over the tokens of [M, T, D], in at least float32: [M, D]; 1 for a channel that
    is 0 throughout."""
    sizes = states.to(torch.promote_types(states.dtype, torch.float32)).square().mean(1).sqrt()
    return torch.where(sizes == 0, 1, sizes)
