"""What scorers have in common that go by notes of single tokens and look at no keys."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from kvframe.stages import Scorer
from kvframe.stages.scorer import Index
from kvframe.types import LeavingUnits, StepInputs, UnitTable


class NotedScorer(Scorer):
    """A scorer whose first note of a token is that token's score; a unit gets the mean of its tokens'.

    Nothing is kept of keys or values.
    """

    capturable: ClassVar[bool] = True

    @property
    @abstractmethod
    def num_notes(self) -> int:
        """Numbers noted of every token; at least the score."""

    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        return {}

    def extend(self, index: Index, unit: LeavingUnits) -> None:
        pass

    def score(self, inputs: StepInputs, index: Index, units: UnitTable) -> Tensor:
        assert inputs.notes is not None
        return units.of_rows(inputs.notes[0])
