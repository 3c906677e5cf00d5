"""Slot three: how relevant is a unit now?"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.stages.base import Slot, Stage
from kvframe.types import Board, LayerLayout, LeavingUnits, PromptInputs, StepInputs, UnitTable
from kvframe.validators import one_of

Index = Mapping[str, Tensor]


class Scorer(Stage):
    """What stands for a unit, and how well that fits the current query.

    Besides `index` and `score`, a scorer may take *notes*: a few numbers for every token, by row, which it writes when
    a prompt is read (`observe_prompt`) or when a step has attended (`observe`), and finds again in `inputs.notes`.
    """

    slot: ClassVar[Slot] = "scorer"
    reads_prompt: ClassVar[bool] = False
    """Whether `observe_prompt` is to be called."""
    reads_attention: ClassVar[bool] = False
    """Whether `observe` is to be called, which costs a second pass over the attended tokens in every step."""

    @property
    def num_notes(self) -> int:
        """Numbers noted of every token."""
        return 0

    @property
    def means(self) -> tuple[str, str] | None:
        """Which tensors of the index are the mean key and the mean value of a unit; None where there are none.

        What is not retrieved can be estimated from them.
        """
        return None

    @property
    def sources(self) -> tuple[int, ...]:
        """Dense layers that publish something for the layers behind them."""
        return ()

    def init(self, layout: LayerLayout) -> Any:
        """Running state of one layer."""
        return None

    def begin(self, query: Tensor, state: Any) -> None:
        """The prompt, or the next turn's text, has been read; `query` [B, Hq, D] is that of its last token."""

    def probe(self, inputs: StepInputs, state: Any) -> Tensor:
        """The query that units are scored with, [B, Hq, D]; called once for every generated token, due or not."""
        return inputs.query

    def observe_prompt(self, prompt: PromptInputs, state: Any) -> None:
        """Tokens of a prompt attend in full: write notes, or remember queries."""

    def observe(self, inputs: StepInputs, weights: Tensor, state: Any) -> None:
        """A step has attended: write notes, in place.

        weights: [B, H, G, R] in at least float32, what each row got from each query head of a group; they sum to 1 over
        the attended rows and are 0 elsewhere. Proposed tokens are not observed.
        """

    def publish(self, query: Tensor, keys: Tensor, lengths: Tensor, layout: LayerLayout, board: Board) -> None:
        """A dense layer of `sources` generates: enter something under a word and its `layout.layer_idx` into the board.

        query: [B, Hq, D]; keys: [B, H, L, D] by position, of which the first `lengths` [B] exist, the new token's
        included.
        """

    @abstractmethod
    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        """Summaries of units.

        keys: [M, T, D], values: [M, T, Dv], M independent heads; unit_ids: int64 [M, T], ascending, the unit of each
        token, `num_units` for a token of none.
        Returns named tensors [M, num_units, ...], one entry a unit; the names and trailing shapes are always the same.
        """

    def index_noted(
        self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int, notes: Tensor | None
    ) -> dict[str, Tensor]:
        """The same, where notes of the tokens have been taken: float32 [F, M, T], None for a scorer without."""
        return self.index(keys, values, unit_ids, num_units)

    def extend(self, index: Index, unit: LeavingUnits) -> None:
        """Enter the unit of each head that leaves the window into its column of the index, in place.

        index: tensors [B, H, >= column + 1, ...]. As defined here, `index_noted` summarises the unit of every head, and
        the column changes where a unit leaves. A scorer may do the same faster.
        """
        entries = self.index_noted(*unit.rows(), 1, unit.noted())
        batch_size, num_kv_heads = unit.column.shape
        batches = torch.arange(batch_size, device=unit.column.device)[:, None]
        heads = torch.arange(num_kv_heads, device=unit.column.device)
        for name, tensor in index.items():
            column = unit.column.clamp(max=tensor.shape[2] - 1)
            before = tensor[batches, heads, column]
            entry = entries[name].view_as(before).to(tensor.dtype)
            leaves = unit.leaves.view(*unit.leaves.shape, *(1,) * (entry.dim() - 2))
            tensor[batches, heads, column] = torch.where(leaves, entry, before)

    @abstractmethod
    def score(self, inputs: StepInputs, index: Index, units: UnitTable) -> Tensor:
        """Relevance of every unit, higher is better.

        index: the tensors of `index` as [B, H, U, ...], U = `units.max_units`.
        Returns [B, H, U] in at least float32, -inf for units that do not exist; anything where `inputs.due` is False.
        """


@frozen(kw_only=True)
class MeanKey(Scorer):
    """Scaled product of the query with a unit's mean key, made one score per KV head.

    With the defaults this is the group-consistent score of LouisKV (arXiv 2510.11292): softmax over the units for every
    query head, then the mean over the heads that share a KV head. For units of one token it is the exact attention
    score.
    """

    name: ClassVar[str] = "mean-key"
    capturable: ClassVar[bool] = True
    group_reduction: Literal["mean", "max"] = field(default="mean", validator=one_of("mean", "max"))
    """How the query heads of a group become one."""
    softmax: bool = field(default=True, validator=one_of(True, False))
    """Normalise each query head over the units before the reduction."""
    size_term: bool = field(default=False, validator=one_of(True, False))
    """Add log(unit size), so that the softmax estimates the attention mass of a whole unit."""
    keep_values: bool = field(default=False, validator=one_of(True, False))
    """Keep a unit's mean value as well, for a selector that estimates what it does not retrieve."""

    @property
    def means(self) -> tuple[str, str] | None:
        return ("mean_key", "mean_value") if self.keep_values else None

    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        from kvframe_kernels.unit_index import unit_mean

        index = {"mean_key": unit_mean(keys, unit_ids, num_units)}
        if self.keep_values:
            index["mean_value"] = unit_mean(values, unit_ids, num_units)
        return index

    def extend(self, index: Index, unit: LeavingUnits) -> None:
        from kvframe_kernels.unit_index import window_mean

        for name, states in (("mean_key", unit.keys), ("mean_value", unit.values)):
            if name in index:
                window_mean(
                    index[name], unit.column, unit.leaves, unit.start, unit.size,
                    states, unit.ring_first, unit.ring_size,
                )  # fmt: skip

    def score(self, inputs: StepInputs, index: Index, units: UnitTable) -> Tensor:
        from kvframe_kernels.unit_scores import unit_scores

        centroids = index["mean_key"]
        dtype = torch.promote_types(centroids.dtype, torch.float32)
        return unit_scores(
            inputs.query,
            centroids,
            units.num_units,
            inputs.layout.sm_scale,
            reduction=self.group_reduction,
            softmax=self.softmax,
            log_sizes=units.sizes.clamp(min=1).to(dtype).log() if self.size_term else None,
            due=inputs.due,
        )
