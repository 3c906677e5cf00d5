"""All that the device keeps for finding KV: summaries of units, what a selector keeps of rows, notes of tokens."""

from attrs import evolve
from torch import Tensor

from kvframe.memory.estimated import EstimatedUnits
from kvframe.memory.index import RowIndex, UnitIndex
from kvframe.memory.ledger import Ledger
from kvframe.memory.notes import TokenNotes
from kvframe.stages.scorer import Scorer
from kvframe.stages.selector import Selector
from kvframe.types import LayerLayout, LeavingUnits, Units, UnitTable


class Catalog:
    """What scorer and selector know of the units in a ledger; it follows what becomes of them.

    Where the selector can take nothing there is no index: nothing is ever scored.
    """

    def __init__(self, layout: LayerLayout, scorer: Scorer, selector: Selector, ledger: Ledger, num_rows: int) -> None:
        self._layout = layout
        self._scorer = scorer
        self._ledger = ledger
        self.index = UnitIndex(layout, scorer) if selector.capacity else None
        self.notes = TokenNotes(layout, scorer.num_notes, num_rows) if scorer.num_notes else None
        self.estimated = EstimatedUnits()
        self._rows = RowIndex(layout, selector, num_rows)

    def reserve_rows(self, num_rows: int) -> None:
        """Make room for at least this many tokens a sequence."""
        self._rows.reserve(num_rows)
        if self.notes is not None:
            self.notes.reserve(num_rows)

    def reserve_units(self, num_units: int) -> None:
        """Make room for at least this many units a head."""
        if self.index is not None:
            self.index.reserve(num_units)
        self.estimated.reserve(self._ledger.max_units)

    def fit_units(self, num_units: int) -> None:
        """Have room for just this many units a head that can be selected."""
        if self.index is not None:
            self.index.fit(num_units)
        self.estimated.reserve(self._ledger.max_units)

    def add_block(self, batch: int, start: int, rows: Tensor, units: Units, columns: Tensor) -> None:
        """Units of one sequence whose tokens, rows [H, n, D + Dv], lie in their order from row `start` on.

        columns: int64 [H, U], where the ledger has entered them.
        """
        entries = self._summarise(batch, start, rows, units)
        if self.index is not None:
            self.index.write(batch, columns, entries)

    def regroup(self, batch: int, start: int, rows: Tensor, units: Units, moves: tuple[Tensor, Tensor, Tensor]) -> None:
        """The same for units that take the place of others; moves: what `Ledger.regroup` has said of them."""
        entries = self._summarise(batch, start, rows, units)
        first, sources, is_new = moves
        if self.index is not None:
            self.index.regroup(batch, sources, entries, first, is_new)
        self.estimated.regroup(batch, sources, is_new)

    def _summarise(self, batch: int, start: int, rows: Tensor, units: Units) -> dict[str, Tensor]:
        """What was noted of the tokens moves along, what is kept of rows is made, and what stands for the units is
        given back; nothing where nothing can be selected."""
        notes = None
        if self.notes is not None:
            self.notes.reorder(batch, start, units.order)
            notes = self.notes.of(batch, start, start + rows.shape[1])
        if self.index is None:
            return {}
        unit_ids, num_units = units.ids(), units.sizes.shape[1]
        keys, values = rows[..., : self._layout.head_dim], rows[..., self._layout.head_dim :]
        self._rows.write(batch, start, keys, values, unit_ids, num_units)
        return self._scorer.index_noted(keys, values, unit_ids, num_units, notes)

    def extend(self, unit: LeavingUnits) -> None:
        """The unit of each head that leaves the window, where one does."""
        self._rows.extend(unit)
        if self.index is not None:
            if self.notes is not None:
                unit = evolve(unit, notes=self.notes.tensor)
            self._scorer.extend(self.index.tensors, unit)
        self.estimated.extend(unit)

    def units(self) -> UnitTable:
        """The units that can be selected, where there is an index."""
        index = self.index
        assert index is not None, "nothing can be selected"
        max_units = max(1, min(self._ledger.visible_units(), index.max_units))
        visible, means = index.view(max_units), self._scorer.means
        return UnitTable(
            offsets=self._ledger.unit_offsets,
            num_units=self._ledger.num_units,
            max_units=max_units,
            index=visible,
            means=None if means is None else (visible[means[0]], visible[means[1]]),
            row_index=self._rows.tensors,
            channels=self._rows.channels,
        )

    def begin_decode(self) -> None:
        """The prompt is over; units leave the window from here on."""
        self._rows.begin_decode()

    def forget(self) -> None:
        """As at the start, in place."""
        if self.index is not None:
            self.index.forget()
        self._rows.forget()
        self.estimated.forget()
        if self.notes is not None:
            self.notes.forget()

    def addresses(self) -> list[int]:
        """Where the index lies."""
        return [] if self.index is None else self.index.addresses()

    def nbytes(self) -> int:
        """Device memory held."""
        parts = (self.index, self._rows, self.notes)
        return sum(part.nbytes() for part in parts if part is not None)
