"""Eviction: what is not selected is gone."""

from typing import ClassVar

from attrs import frozen

from kvframe.memory.drop import DropStore
from kvframe.memory.pool import RowStore
from kvframe.stages.transfer import Transfer
from kvframe.types import Invariant, LayerLayout


@frozen(kw_only=True)
class Drop(Transfer):
    """Nothing comes back: what a decode step neither attends to nor holds in the window is gone.

    A prompt stays whole, on the device, until the first decode step after it has selected. From there on a selection
    chooses among what is resident and what leaves the window in that very step. A later turn attends to what is left.
    """

    name: ClassVar[str] = "drop"
    capturable: ClassVar[bool] = True
    drops: ClassVar[bool] = True
    crosses_link: ClassVar[bool] = False
    waives: ClassVar[frozenset[Invariant]] = frozenset({Invariant.NO_TOKEN_LOST, Invariant.EXACT_BUDGET})

    def init(self, layout: LayerLayout, num_rows: int) -> RowStore:
        return DropStore(layout, num_rows)

    def host_bytes(self, layout: LayerLayout, num_rows: int) -> int:
        return 0
