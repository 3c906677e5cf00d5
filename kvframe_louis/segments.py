"""Output units: temporal segments between the trigger's events."""

from typing import ClassVar

from attrs import field, frozen
from torch import Tensor

from kvframe.stages import UnitBuilder
from kvframe.stages.units import build_runs
from kvframe.types import Decision, LayerLayout, StepInputs, Units
from kvframe.validators import integer


@frozen(kw_only=True)
class SegmentUnits(UnitBuilder):
    """Contiguous runs of generated tokens, cut before each token at which the trigger is due (arXiv 2510.11292).

    An event closes a segment only if that holds `min_segment` tokens; otherwise it goes on growing, so that of two
    events in a row the second closes none. A segment of `max_segment` tokens is closed without an event. A prompt,
    where these units are used for it, is cut into runs of `max_segment`.
    """

    name: ClassVar[str] = "segments"
    capturable: ClassVar[bool] = True
    min_segment: int = field(default=4, validator=integer(at_least=1))
    """An event closes a segment only if that holds this many tokens."""
    max_segment: int = field(default=64, validator=integer(at_least=1))
    """A segment of this many tokens is closed without an event."""

    @property
    def unit_size(self) -> int:
        return min(self.min_segment, self.max_segment)

    @property
    def min_size(self) -> int:
        return min(self.min_segment, self.max_segment)

    @property
    def max_size(self) -> int:
        return self.max_segment

    def build(self, keys: Tensor) -> Units:
        return build_runs(keys, self.max_segment)

    def init(self, layout: LayerLayout) -> None:
        return None

    def boundary(self, inputs: StepInputs, decision: Decision, state: None) -> Tensor:
        return decision.due if decision.event is None else decision.event
