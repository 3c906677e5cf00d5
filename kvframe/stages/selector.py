"""Slot four: which units, under which budget?"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages.base import Slot, Stage
from kvframe.types import Candidates, Invariant, LayerLayout, LeavingUnits, Selection, StepInputs, UnitTable
from kvframe.validators import integer


class Selector(Stage):
    """Turns scores into the rows that a head attends to, besides sinks and window."""

    slot: ClassVar[Slot] = "selector"
    estimates: ClassVar[bool] = False
    """Whether what is not retrieved is estimated; a selection may say of which units."""

    @property
    def needs_means(self) -> bool:
        """Whether the scorer has to keep mean keys and values of units."""
        return self.estimates

    @property
    def ranks(self) -> bool:
        """Whether a selection is `choose` among `candidates`, each with its share of the attention; a trigger that
        reviews looks at these in between."""
        return False

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Rows that a head gets on average, where there are as many."""

    def budget_in(self, layout: LayerLayout) -> int:
        """Rows that a head of a layer selects, where there are as many. The capacity, unless layers differ."""
        return self.capacity

    def capacity_in(self, layout: LayerLayout) -> int:
        """The most rows that one head of a layer can get; slots are sized by it. The capacity, unless heads or layers
        share a budget or leave room for tokens to come."""
        return self.capacity

    @property
    def scales_channels(self) -> bool:
        """Whether `row_index` is to be told how large each channel of the keys is."""
        return False

    def row_index(
        self, keys: Tensor, values: Tensor, centres: Tensor, channels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What is kept on the device of every row that leaves the window, for `units.row_index`.

        keys: [M, T, D], values: [M, T, Dv]; centres: [M, T, D], for each token the mean key of its unit; channels: [M,
        D] in at least float32, the size of each channel of keys - centres over the first rows of a head, which later
        rows share and `units.channels` has again. None unless `scales_channels`.
        Returns named tensors [M, T, ...]; names and trailing shapes are always the same.
        """
        return {}

    def extend(self, row_index: Mapping[str, Tensor], unit: LeavingUnits, channels: Tensor | None = None) -> None:
        """Enter the rows of the unit of each head that leaves the window, in place.

        row_index: tensors [B, H, > R, ...], of which the last row takes what belongs nowhere; channels: [B, H, D], as
        for `row_index`. As defined here, `row_index` makes the entries of a unit of every head, and those of a unit
        that leaves are entered. A selector may do the same faster.
        """
        from kvframe_kernels.unit_index import unit_mean

        keys, values, unit_ids = unit.rows()
        heads = unit.start.shape
        rows = unit.start[..., None] + torch.arange(unit.max_size, device=unit.start.device)
        inside = unit.leaves[..., None] & (unit_ids.view(*heads, -1) == 0)
        centres = unit_mean(keys, unit_ids, 1).expand_as(keys)
        sizes = None if channels is None else channels.flatten(0, 1)
        for name, entry in self.row_index(keys, values, centres, sizes).items():
            tensor = row_index[name]
            column = torch.where(inside, rows, tensor.shape[2] - 1)
            column = column.view(*column.shape, *(1,) * (tensor.dim() - 3))
            tensor.scatter_(
                2, column.expand(*column.shape[:3], *tensor.shape[3:]), entry.view(*heads, *entry.shape[1:])
            )

    @abstractmethod
    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> Selection | tuple[Tensor, Tensor]:
        """Rows for every head.

        scores: [B, H, U], -inf where there is no unit, and anything where `inputs.due` is False.
        Returns (rows, count), or a Selection: int64 [B, H, capacity_in], each row once, with -1 behind the count, and
        int64 [B, H]; anything where `inputs.due` is False.
        """

    def candidates(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> Candidates:
        """The first half of `select`, where the selector `ranks`: the tokens that the best units hold, with their
        shares. Anything where `inputs.due` is False."""
        raise NotImplementedError(f"{type(self).__name__} says that it ranks, and defines no candidates")

    def choose(
        self, inputs: StepInputs, candidates: Candidates, scores: Tensor, units: UnitTable
    ) -> Selection | tuple[Tensor, Tensor]:
        """The second half: rows as `select` returns them; `inputs.due` may have become narrower in between."""
        raise NotImplementedError(f"{type(self).__name__} says that it ranks, and defines no choose")


def best_rows(
    inputs: StepInputs, scores: Tensor, units: UnitTable, token_budget: int, room: int
) -> tuple[Tensor, Tensor]:
    """Units in score order until a budget is filled exactly, the last one cut to fit; and slots left empty.

    Returns rows int64 [B, H, token_budget + room], -1 behind the count int64 [B, H].
    """
    from kvframe_kernels.select_units import select_units

    rows, count = select_units(scores, units.offsets, token_budget, due=inputs.due)
    return torch.nn.functional.pad(rows, (0, room), value=-1) if room else rows, count


def only_due(rows: Tensor, count: Tensor, due: Tensor | None) -> tuple[Tensor, Tensor]:
    """A selection that says nothing for heads that do not select, where a kernel's may say anything: for selectors that
    look at another one's rows."""
    if due is None:
        return rows, count
    return rows.masked_fill(~due[..., None], -1), count.masked_fill(~due, 0)


@frozen(kw_only=True)
class TopBudget(Selector):
    """Units in score order until the budget is filled exactly; the last unit is cut to fit.

    Ties go to the lower unit. The same budget for every head.
    """

    name: ClassVar[str] = "top-budget"
    capturable: ClassVar[bool] = True
    token_budget: int = field(default=1024, validator=integer(at_least=1))
    """Tokens that every head retrieves, where there are as many; sinks and window come on top."""
    room: int = field(default=0, validator=integer(at_least=0))
    """Tokens that leave the window after a selection and are attended all the same, until the next one chooses among
    them: the first so many."""

    @property
    def capacity(self) -> int:
        return self.token_budget

    def capacity_in(self, layout: LayerLayout) -> int:
        return self.token_budget + self.room

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> tuple[Tensor, Tensor]:
        return best_rows(inputs, scores, units, self.token_budget, self.room)


@frozen(kw_only=True)
class SelectNothing(Selector):
    """No rows at all: sinks and window alone."""

    name: ClassVar[str] = "nothing"
    capturable: ClassVar[bool] = True

    @property
    def capacity(self) -> int:
        return 0

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> tuple[Tensor, Tensor]:
        rows = torch.empty(*scores.shape[:2], 0, dtype=torch.int64, device=scores.device)
        return rows, rows.new_zeros(scores.shape[:2])


@frozen(kw_only=True)
class TopBytes(Selector):
    """Units in score order until so many bytes of the store are asked for; the last unit is cut to fit.

    How many tokens that are depends on the store: four times as many in 4 bits as in 16.
    """

    name: ClassVar[str] = "top-bytes"
    capturable: ClassVar[bool] = True
    waives: ClassVar[frozenset[Invariant]] = frozenset({Invariant.EXACT_BUDGET})
    byte_budget: int = field(default=256 * 1024, validator=integer(at_least=1))
    """Bytes of rows that every head retrieves, resident or not."""
    max_tokens: int = field(default=1024, validator=integer(at_least=1))
    """Tokens that every head has slots for."""

    @property
    def capacity(self) -> int:
        return self.max_tokens

    def select(self, inputs: StepInputs, scores: Tensor, units: UnitTable) -> tuple[Tensor, Tensor]:
        from kvframe_kernels.select_units import select_units

        num_tokens = min(self.max_tokens, self.byte_budget // max(1, inputs.row_bytes))
        if num_tokens == 0:
            rows = torch.full((*scores.shape[:2], self.max_tokens), -1, dtype=torch.int64, device=scores.device)
            return rows, rows.new_zeros(scores.shape[:2])
        rows, count = select_units(scores, units.offsets, num_tokens, due=inputs.due)
        return torch.nn.functional.pad(rows, (0, self.max_tokens - num_tokens), value=-1), count
