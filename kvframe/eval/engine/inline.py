"""One cell after the other, in this process: for a debugger, and where nothing is to be gained by more."""

from collections.abc import Iterator, Sequence

from kvframe.eval.engine.base import Engine, Started
from kvframe.eval.outcome import Outcome
from kvframe.eval.study import Cell
from kvframe.eval.worker import run_cell


class InlineEngine(Engine):
    """No workers at all."""

    @property
    def workers(self) -> int:
        return 1

    def run(self, cells: Sequence[Cell], started: Started) -> Iterator[tuple[Cell, Outcome]]:
        for cell in cells:
            started(cell)
            yield cell, run_cell(cell)
