"""Slot two: which tokens form a unit?"""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.errors import SlotError
from kvframe.stages.base import Slot, Stage
from kvframe.types import BlockInputs, Decision, LayerLayout, StepInputs, Units
from kvframe.validators import integer


class UnitBuilder(Stage):
    """Cuts the prompt, and the tokens that follow it, into retrieval units; each KV head of each sequence on its own.

    Every token that leaves the window belongs to exactly one unit. Prompt units may take their tokens from anywhere in
    a block; units of later tokens are contiguous, because their boundaries are fixed while they still lie in the
    window.
    """

    slot: ClassVar[Slot] = "units"

    @property
    @abstractmethod
    def unit_size(self) -> int:
        """Tokens of a usual unit; a budget below it is refused."""

    @property
    @abstractmethod
    def min_size(self) -> int:
        """A boundary closes an output unit only if that holds this many tokens; otherwise the unit goes on growing."""

    @property
    @abstractmethod
    def max_size(self) -> int:
        """An output unit of this many tokens is closed in any case."""

    @property
    def regroup_size(self) -> int | None:
        """Generated tokens are grouped anew by `regroup`, so many at a time, once all of them have left the window;
        None for never. A multiple of `max_size`."""
        return None

    @abstractmethod
    def build(self, keys: Tensor) -> Units:
        """Units of a run of prompt tokens; keys [N, T, D], N heads, T >= 1."""

    def regroup(self, keys: Tensor) -> Units:
        """Units of `regroup_size` generated tokens, in place of those that their boundaries made; keys as in
        `build`."""
        return self.build(keys)

    def build_block(self, keys: Tensor, block: BlockInputs) -> Units:
        """The same, where more is known of the tokens than their keys."""
        return self.build(keys)

    @abstractmethod
    def init(self, layout: LayerLayout) -> Any:
        """Running state of one layer's output side."""

    @abstractmethod
    def boundary(self, inputs: StepInputs, decision: Decision, state: Any) -> Tensor | None:
        """bool [B, H]: does a unit end before this token? None where none ever does but at `max_size`."""


def build_runs(keys: Tensor, size: int) -> Units:
    """Consecutive runs of `size` tokens, the last one perhaps shorter; keys [N, T, D]."""
    num_heads, num_tokens, _ = keys.shape
    starts = torch.arange(0, num_tokens, size, device=keys.device)
    sizes = (num_tokens - starts).clamp(max=size)
    return Units(
        order=torch.arange(num_tokens, device=keys.device).expand(num_heads, -1),
        sizes=sizes.expand(num_heads, -1),
    )


@frozen(kw_only=True)
class TokenUnits(UnitBuilder):
    """Every token is a unit of its own."""

    name: ClassVar[str] = "tokens"
    capturable: ClassVar[bool] = True

    @property
    def unit_size(self) -> int:
        return 1

    @property
    def min_size(self) -> int:
        return 1

    @property
    def max_size(self) -> int:
        return 1

    def build(self, keys: Tensor) -> Units:
        return build_runs(keys, 1)

    def init(self, layout: LayerLayout) -> None:
        return None

    def boundary(self, inputs: StepInputs, decision: Decision, state: None) -> None:
        return None


@frozen(kw_only=True)
class PageUnits(UnitBuilder):
    """Runs of `page_size` consecutive tokens, as in Quest (arXiv 2406.10774)."""

    name: ClassVar[str] = "pages"
    capturable: ClassVar[bool] = True
    page_size: int = field(default=16, validator=integer(at_least=1))
    """Tokens of a page."""

    @property
    def unit_size(self) -> int:
        return self.page_size

    @property
    def min_size(self) -> int:
        return self.page_size

    @property
    def max_size(self) -> int:
        return self.page_size

    def build(self, keys: Tensor) -> Units:
        return build_runs(keys, self.page_size)

    def init(self, layout: LayerLayout) -> None:
        return None

    def boundary(self, inputs: StepInputs, decision: Decision, state: None) -> None:
        return None


@frozen(kw_only=True)
class DecoupledUnits(UnitBuilder):
    """One builder for the prompt, another for what is generated."""

    name: ClassVar[str] = "decoupled"
    capturable: ClassVar[bool] = True
    prompt: UnitBuilder = field()
    """Builds the prompt's units."""
    output: UnitBuilder = field()
    """Cuts what comes after the prompt."""

    @prompt.validator
    @output.validator
    def _check(self, attribute: Any, value: object) -> None:
        if not isinstance(value, UnitBuilder):
            raise SlotError(f"DecoupledUnits.{attribute.name} must be a UnitBuilder, got {value!r}")

    @property
    def unit_size(self) -> int:
        return self.prompt.unit_size

    @property
    def min_size(self) -> int:
        return self.output.min_size

    @property
    def max_size(self) -> int:
        return self.output.max_size

    @property
    def regroup_size(self) -> int | None:
        return self.output.regroup_size

    def regroup(self, keys: Tensor) -> Units:
        return self.output.regroup(keys)

    def build(self, keys: Tensor) -> Units:
        return self.prompt.build(keys)

    def build_block(self, keys: Tensor, block: BlockInputs) -> Units:
        return self.prompt.build_block(keys, block)

    def init(self, layout: LayerLayout) -> Any:
        return self.output.init(layout)

    def boundary(self, inputs: StepInputs, decision: Decision, state: Any) -> Tensor | None:
        return self.output.boundary(inputs, decision, state)
