"""Slot five: where does KV that is not resident live, and how does it return?"""

from abc import abstractmethod
from typing import ClassVar

import torch
from attrs import frozen

from kvframe.memory.codec import Codec
from kvframe.memory.pool import RowPool, RowStore
from kvframe.stages.base import Slot, Stage
from kvframe.types import LayerLayout


class Transfer(Stage):
    """Chooses the store behind the resident slots. The store moves rows; the runtime asks it only for what is
    missing."""

    slot: ClassVar[Slot] = "transfer"
    drops: ClassVar[bool] = False
    """Whether a token that a decode step neither attends to nor holds in the window is gone for good."""
    crosses_link: ClassVar[bool] = True
    """Whether recalled rows come from the host."""

    @abstractmethod
    def init(self, layout: LayerLayout, num_rows: int) -> RowStore:
        """A store for `num_rows` tokens of one layer."""

    def codec(self, layout: LayerLayout) -> Codec | None:
        """How rows are stored, where they do not come back as they were."""
        return None

    def row_bytes(self, layout: LayerLayout) -> int:
        """Bytes of a row in the store."""
        return layout.row_bytes

    @abstractmethod
    def host_bytes(self, layout: LayerLayout, num_rows: int) -> int:
        """Host memory that `init` will take, in bytes."""


@frozen(kw_only=True)
class HostPool(Transfer):
    """All KV in host memory, pinned where there is a CUDA device; recalled row by row, unit-contiguous."""

    name: ClassVar[str] = "host-pool"
    capturable: ClassVar[bool] = True

    def init(self, layout: LayerLayout, num_rows: int) -> RowStore:
        return RowPool(layout, num_rows, torch.device("cpu"), crosses_link=self.crosses_link)

    def host_bytes(self, layout: LayerLayout, num_rows: int) -> int:
        return layout.batch_size * layout.num_kv_heads * num_rows * layout.row_bytes


@frozen(kw_only=True)
class KeepOnDevice(Transfer):
    """All KV on the device; only attention is sparse. Rows still move into slots, but none crosses the link."""

    name: ClassVar[str] = "keep-on-device"
    capturable: ClassVar[bool] = True
    crosses_link: ClassVar[bool] = False

    def init(self, layout: LayerLayout, num_rows: int) -> RowStore:
        return RowPool(layout, num_rows, layout.device, crosses_link=self.crosses_link)

    def host_bytes(self, layout: LayerLayout, num_rows: int) -> int:
        return 0
