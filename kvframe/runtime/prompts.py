"""Prompts: attended in full, and shown to the stages that read them."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvframe.attention import causal_attention
from kvframe.composition import Policy
from kvframe.memory.base import LayerMemory
from kvframe.memory.ledger import Ledger
from kvframe.memory.notes import TokenNotes
from kvframe.memory.positions import RowPositions
from kvframe.memory.survivors import Survivors
from kvframe.runtime.states import StageStates
from kvframe.types import Board, LayerLayout, PromptInputs


class PromptReader:
    """Attends from new tokens to everything stored and to themselves. It stores nothing."""

    def __init__(
        self,
        layout: LayerLayout,
        policy: Policy,
        ledger: Ledger,
        memory: LayerMemory,
        positions: RowPositions,
        *,
        notes: TokenNotes | None,
        survivors: Survivors | None,
        board: Board,
    ) -> None:
        self._layout = layout
        self._policy = policy
        self._ledger = ledger
        self._memory = memory
        self._positions = positions
        self._notes = notes
        self._survivors = survivors
        self._board = board

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
        """Full causal attention of the real tokens, as `LayerRuntime.prompt` has them; the last `num_tail` are only
        proposed.

        ahead: called before attention of the last sequence is queued, where earlier tokens had to be read.
        """
        num_queries, past, width = query.shape[2], self._ledger.lengths, keys.shape[-1]
        if max(past) == 0 and min(num_real) == num_queries:
            for batch in range(query.shape[0]):
                self._observe(batch, query[batch], keys[batch], num_tail, states)
            return causal_attention(query, keys, values, self._layout.sm_scale)
        out = query.new_zeros(*query.shape[:3], values.shape[-1])
        for batch, (num, length) in enumerate(zip(num_real, past, strict=True)):
            if num:
                row, own = slice(batch, batch + 1), slice(num_queries - num, num_queries)
                row_keys, row_values = keys[row, :, own], values[row, :, own]
                if length:
                    # Rows lie in unit order, which the full attention of later tokens does not mind.
                    rows = self._memory.read(batch, length, num)
                    rows[:, length:, :width], rows[:, length:, width:] = row_keys[0], row_values[0]
                    row_keys, row_values = rows[None, ..., :width], rows[None, ..., width:]
                # What is read next comes while this is attended to.
                if batch + 1 < len(past):
                    if past[batch + 1] and num_real[batch + 1]:
                        self._memory.prefetch(batch + 1, past[batch + 1], num_real[batch + 1])
                elif ahead is not None:
                    ahead()
                alive = None if self._survivors is None else self._survivors.of(batch, length)
                self._observe(batch, query[batch, :, own], row_keys[0], num_tail, states, alive)
                out[row, :, own] = causal_attention(
                    query[row, :, own], row_keys, row_values, self._layout.sm_scale, alive
                )
        return out

    def _observe(
        self,
        batch: int,
        query: Tensor,
        keys: Tensor,
        num_tail: int,
        states: StageStates,
        alive: Tensor | None = None,
    ) -> None:
        """Show trigger and scorer a run of one sequence: query [Hq, T, D], keys [H, L, D]; the last `num_tail` are
        proposed.

        alive: bool [H, L - T], those of the earlier tokens that are left; None for all.
        """
        trigger, scorer, num_keys = self._policy.trigger, self._policy.scorer, keys.shape[1] - num_tail
        if not (trigger.reads_prompt or scorer.reads_prompt) or query.shape[1] <= num_tail:
            return
        if alive is not None:
            alive = torch.nn.functional.pad(alive, (0, num_keys - alive.shape[-1]), value=True)
        if self._notes is None:
            notes = query.new_zeros(0, keys.shape[0], num_keys, dtype=torch.float32)
        else:
            notes = self._notes.of(batch, 0, num_keys)
        prompt = PromptInputs(
            query=query[:, : query.shape[1] - num_tail],
            keys=keys[:, :num_keys],
            notes=notes,
            positions=lambda: self._positions_of(batch, num_keys),
            alive=alive,
            batch=batch,
            layout=self._layout,
            board=self._board,
        )
        if trigger.reads_prompt:
            trigger.observe_prompt(prompt, states.trigger)
        if scorer.reads_prompt:
            scorer.observe_prompt(prompt, states.scorer)

    def _positions_of(self, batch: int, num_keys: int) -> Tensor:
        """int64 [H, num_keys]: the positions of a sequence's rows, of a run that is not stored yet as well."""
        if self._ledger.lengths[batch]:
            return self._positions.of(batch, num_keys).to(self._layout.device)
        return torch.arange(num_keys, device=self._layout.device).expand(self._layout.num_kv_heads, -1)
