"""A store whose traffic is seen from outside."""

from typing import Any

import torch
from torch import Tensor

from kvframe.composition import Policy
from kvframe.memory.pool import RowStore
from kvframe.memory.slots import SlotMemory
from kvframe.runtime import RetrievalLayer
from kvframe.testing.altered import altered
from kvframe.testing.broken import Broken
from kvframe.testing.cases import Case
from kvframe.types import LayerLayout


class WatchedStore:
    """Another store, and what it moves: seen by what arrives in buffers that held NaN."""

    def __init__(self, store: RowStore) -> None:
        self._store = store
        self.written = self.loaded = self.recalled = 0
        self.incoming: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, batch: int, start: int, rows: Tensor) -> None:
        """Rows of a prompt."""
        self.written += rows.nbytes
        self._store.write(batch, start, rows)

    def write_recent(self, batch: int, start: int, rows: Tensor) -> None:
        """Rows of a prompt that stay on the device as well."""
        self.written += rows.nbytes
        self._store.write_recent(batch, start, rows)

    def append(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """A token of every head."""
        self.written += keys.nbytes + values.nbytes
        self._store.append(rows, keys, values)

    def read(self, batch: int, stop: int, room: int = 0) -> Tensor:
        """Everything, for full attention."""
        rows = self._store.read(batch, stop, room)
        self.loaded += rows[:, :stop].nbytes
        return rows

    def read_range(self, batch: int, start: int, stop: int) -> Tensor:
        """Some of it, to be grouped anew."""
        rows = self._store.read_range(batch, start, stop)
        self.loaded += rows.nbytes
        return rows

    def recall(self, incoming: Tensor, k_slots: Tensor, v_slots: Tensor) -> None:
        """Raises Broken where another slot is written than was asked for."""
        self.incoming = incoming.clone()
        keys, values = torch.full_like(k_slots, torch.nan), torch.full_like(v_slots, torch.nan)
        self._store.recall(incoming, keys, values)
        for name, slots in (("keys", keys), ("values", values)):
            came = ~slots.isnan().any(-1)
            if not torch.equal(came, incoming >= 0):
                batch, head, slot = (int(index) for index in (came != (incoming >= 0)).nonzero()[0])
                asked = int(incoming[batch, head, slot])
                raise Broken(
                    f"row {batch}, KV head {head}, slot {slot}: the store was asked for "
                    f"{f'row {asked}' if asked >= 0 else 'nothing'}, and "
                    f"{'wrote' if came[batch, head, slot] else 'did not write'} {name}"
                )
        came = incoming >= 0
        self.recalled += int(came.sum())
        self.loaded += keys[came].nbytes + values[came].nbytes
        k_slots[came], v_slots[came] = keys[came], values[came]


def watched_layer(policy: Policy, case: Case) -> tuple[RetrievalLayer, SlotMemory, WatchedStore]:
    """An offloading layer whose store is watched."""
    stores = []

    def init(original: Any, layout: LayerLayout, num_rows: int) -> Any:
        stores.append(WatchedStore(original(layout, num_rows)))
        return stores[-1]

    layer = case.layer(policy.swap(transfer=altered(policy.transfer, init=init)), "offload")
    assert isinstance(layer.memory, SlotMemory)
    return layer, layer.memory, stores[-1]
