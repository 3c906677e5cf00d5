"""Generated tokens that are grouped anew when they are old."""

from typing import Any, ClassVar

from attrs import field, frozen
from torch import Tensor

from kvframe.stages.units import UnitBuilder
from kvframe.types import BlockInputs, Decision, LayerLayout, StepInputs, Units
from kvframe.validators import integer, part


@frozen(kw_only=True)
class RegroupedUnits(UnitBuilder):
    """Another builder's units; of generated tokens that have left the window, every `block_size` are grouped anew.

    As ClusterKV (2024, arXiv 2412.03213) clusters what was generated, 320 tokens at a time, and RetroInfer (2025,
    arXiv 2505.02922), 1,024 at a time. A block begins where the text before the generated tokens had left the window;
    the end of a block is the end of a unit as well. A block that a later turn interrupts stays as it was.
    """

    name: ClassVar[str] = "regrouped"
    capturable: ClassVar[bool] = True
    units: UnitBuilder = field(validator=part(UnitBuilder))
    """Makes the units of the prompt, and the first ones of what is generated."""
    by: UnitBuilder = field(validator=part(UnitBuilder))
    """Groups a block of generated tokens as it would a prompt's."""
    block_size: int = field(default=1024, validator=integer(at_least=1))
    """Generated tokens grouped at once, rounded up to a multiple of the longest unit that `units` makes of them."""

    @property
    def unit_size(self) -> int:
        return self.units.unit_size

    @property
    def min_size(self) -> int:
        return self.units.min_size

    @property
    def max_size(self) -> int:
        return self.units.max_size

    @property
    def regroup_size(self) -> int:
        longest = self.units.max_size
        return -(-self.block_size // longest) * longest

    def build(self, keys: Tensor) -> Units:
        return self.units.build(keys)

    def build_block(self, keys: Tensor, block: BlockInputs) -> Units:
        return self.units.build_block(keys, block)

    def regroup(self, keys: Tensor) -> Units:
        return self.by.build(keys)

    def init(self, layout: LayerLayout) -> Any:
        return self.units.init(layout)

    def boundary(self, inputs: StepInputs, decision: Decision, state: Any) -> Tensor | None:
        return self.units.boundary(inputs, decision, state)
