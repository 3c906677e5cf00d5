"""What an engine is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from kvframe.eval.outcome import Outcome
from kvframe.eval.study import Cell

Started = Callable[[Cell], None]


class Engine(ABC):
    """Runs cells, in any order, and tells how each ended. A failing cell is an outcome; it stops nobody."""

    @property
    @abstractmethod
    def workers(self) -> int:
        """Cells that run at the same time, at most."""

    @abstractmethod
    def run(self, cells: Sequence[Cell], started: Started) -> Iterator[tuple[Cell, Outcome]]:
        """Every cell with its end, as soon as that is known.

        started: called when a cell is handed to a worker.

        Closing the iterator, as an exception in its loop does, ends what is running.
        """
