"""A layer under a policy that is fed from a trace."""

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from kvframe.composition import Policy
from kvframe.eval.oracle import Oracle
from kvframe.memory.dense import DenseMemory, ShadowMemory
from kvframe.memory.positions import RowPositions
from kvframe.memory.token_ids import TokenIds
from kvframe.runtime import RetrievalLayer
from kvframe.runtime.prompts import PromptReader
from kvframe.runtime.states import StageStates
from kvframe.stages import UnitBuilder
from kvframe.types import BlockInputs, Board, LayerLayout, Units
from kvframe_kernels.slot_attention import Entries, slot_attention

Built = dict[Any, Units]
"""Prompt units that were built before, by what they were built from."""


class ReplayMemory(ShadowMemory):
    """Measures as `ShadowMemory` does, against an oracle that was computed once, and attends as the policy would."""

    oracle: Oracle
    positions: RowPositions
    """Of the layer."""
    row_positions: Tensor | None = None
    """int64 [H, R]: the position of each row; None where that is to be asked anew."""
    step: int
    """Decode steps that were measured."""
    expected: Tensor
    """[Hq, Dv]: what full attention gives in the last step."""
    oracle_mass: Tensor
    """float64 [B, H]: sum over steps of what the heaviest tokens, as many as are attended to, hold."""

    def attend(self, query: Tensor, tail: tuple[Tensor, Tensor] | None, entries: Entries | None = None) -> Tensor:
        attended, oracle = self.attended()[0], self.oracle
        if self.row_positions is None:
            self.row_positions = self.positions.of(0, self.keys.shape[2])
        weights = oracle.weights[self.step].gather(-1, self.row_positions)
        ranks = oracle.ranks[self.step].gather(-1, self.row_positions)
        count = attended.sum(-1, keepdim=True)
        self.captured_mass += weights.double().masked_fill(~attended, 0).sum(-1)
        self.oracle_recall += (attended & (ranks < count)).sum(-1).double() / count[:, 0]
        self.oracle_mass += oracle.captured[self.step].gather(-1, count - 1)[:, 0]
        self.expected = oracle.out[self.step]
        self.step += 1
        return DenseMemory.attend(self, query, tail, entries)

    def store_block(self, batch: int, start: int, rows: Tensor) -> None:
        super().store_block(batch, start, rows)
        self.row_positions = None

    def reorder(self, batch: int, start: int, order: Tensor, rows: Tensor) -> None:
        super().reorder(batch, start, order, rows)
        self.row_positions = None

    def _attend_where(
        self,
        visible: Tensor,
        query: Tensor,
        states: tuple[Tensor, Tensor],
        tail: tuple[Tensor, Tensor] | None,
        entries: Entries | None = None,
    ) -> Tensor:
        """As in `DenseMemory`, over the visible rows alone, which are few; there is no tail in a replay."""
        assert tail is None
        _, heads, rows = visible.nonzero(as_tuple=True)
        count = visible[0].sum(-1)
        places = torch.arange(len(rows)) - (count.cumsum(0) - count).repeat_interleave(count)
        chosen = rows.new_zeros(len(count), int(count.max()))
        chosen[heads, places] = rows
        bias = self._bias(torch.arange(chosen.shape[1]) < count[None, :, None])
        # By index: gather takes number by number, and not row by row.
        keys, values = (part[:, torch.arange(len(count))[:, None], chosen] for part in states)
        return slot_attention(query, keys, values, bias, self._layout.sm_scale, entries=entries)[0]


class ReplayReader(PromptReader):
    """A prompt's attention gives nothing that a trace does not hold, so it is left out; stages that read prompts see
    its queries and keys all the same."""

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        num_real: list[int],
        num_tail: int,
        states: StageStates,
        ahead: Callable[[], None] | None,
    ) -> Tensor:
        if self._policy.trigger.reads_prompt or self._policy.scorer.reads_prompt:
            past = self._memory.read(0, self._ledger.lengths[0])[..., : keys.shape[-1]]
            self._observe(0, query[0], torch.cat([past, keys[0]], 1), num_tail, states)
        return query.new_zeros(*query.shape[:3], values.shape[-1])


class ReplayLayer(RetrievalLayer):
    """`shadow` execution without the model. What `decode` returns is what the policy's attention would have given."""

    memory: ReplayMemory

    def __init__(
        self,
        layout: LayerLayout,
        policy: Policy,
        capacity: int,
        oracle: Oracle,
        *,
        built: Built,
        board: Board,
        token_ids: TokenIds | None,
    ) -> None:
        """built: shared by layers that read the same trace."""
        shared = policy.swap(units=share_units(policy.units, built))
        super().__init__(layout, shared, capacity, "shadow", board=board, token_ids=token_ids)
        memory = ReplayMemory(
            layout, self.ledger, capacity, policy.selector.capacity_in(layout), policy.transfer.codec(layout)
        )
        memory.oracle, memory.step = oracle, 0
        memory.positions = self.positions
        memory.oracle_mass = torch.zeros_like(memory.captured_mass)
        self.memory = memory
        self._reader = ReplayReader(
            layout, shared, self.ledger, memory, self.positions,
            notes=self.catalog.notes, survivors=None, board=board,
        )  # fmt: skip

    def read_prompt(self, query: Tensor, keys: Tensor, values: Tensor) -> None:
        """Prompt tokens [1, ..., T, ...], all of them real."""
        num_tokens = keys.shape[2]
        self.prompt(query, keys, values, [num_tokens], num_tokens)


def share_units(units: UnitBuilder, built: Built) -> UnitBuilder:
    """The same builder, which builds the units of the same prompt block once and then knows them."""
    kind = type(units)

    def build_block(self: UnitBuilder, keys: Tensor, block: BlockInputs) -> Units:
        key = units, *(_digest(part) for part in (keys, block.token_ids, block.notes))
        if key not in built:
            built[key] = units.build_block(keys, block)
        return built[key]

    # Made at run time, because the class of a builder is whoever's: everything but this one method stays as it is.
    shared = type(kind.__name__, (kind,), {"build_block": build_block, "__slots__": ()})
    fields: Any = attrs.fields(kind)  # type: ignore[arg-type]  # a stage is an attrs class
    options = {field.alias: getattr(units, field.name) for field in fields if field.init}
    made: UnitBuilder = shared(**options)
    return made


def _digest(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    return tuple(tensor.shape), hash(tensor.contiguous().view(torch.uint8).numpy().tobytes())
