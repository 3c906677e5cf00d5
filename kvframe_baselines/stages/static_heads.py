"""Some KV heads attend to everything, the others to sinks and window, for a whole text."""

from typing import Any, ClassVar

import torch
from attrs import define, field, frozen
from torch import Tensor

from kvframe.attention import attention_sums
from kvframe.errors import ConfigError
from kvframe.stages import Trigger
from kvframe.types import Board, Decision, LayerLayout, PromptInputs, StepInputs
from kvframe.validators import integer, share

Heads = tuple[tuple[int, ...], ...]

_SCORES = "retrieval head scores"


@define(eq=False)
class StaticHeadsState:
    """Running state of one layer."""

    nobody: Tensor  # bool [B, H], all false
    full: Tensor | None  # bool [B, H], heads that attend in full; None while that is to be found


def _to_heads(value: Any) -> Any:
    return tuple(tuple(heads) for heads in value) if isinstance(value, list | tuple) else value


@frozen(kw_only=True)
class StaticHeads(Trigger):
    """Retrieval heads attend to everything at every step, streaming heads to sinks and window: DuoAttention (2024,
    arXiv 2410.10819).

    The paper learns a gate for each KV head. Here a head's score is the share of the attention of a prompt's last
    queries that goes neither to the first `sink_size` tokens nor to the last `recent_size` before the query, the mean
    over queries and over the query heads of its group. Of all KV heads of the layers under the policy, the share
    `sparsity` with the lowest scores streams, for each sequence on its own. Heads that are known can be given instead.
    Nothing is selected.
    """

    name: ClassVar[str] = "static-heads"
    attends_in_full: ClassVar[bool] = True
    sparsity: float = field(default=0.5, validator=share)
    """Share of all KV heads that stream."""
    sink_size: int = field(default=128, validator=integer(at_least=0))
    """First tokens whose attention does not speak for retrieval."""
    recent_size: int = field(default=256, validator=integer(at_least=1))
    """Tokens up to the query whose attention does not speak for retrieval."""
    num_queries: int = field(default=64, validator=integer(at_least=1))
    """Queries at the end of a prompt that are asked."""
    full_heads: Heads | None = field(default=None, converter=_to_heads)
    """For each layer of the model its retrieval heads; None to find them in the prompt."""

    @full_heads.validator
    def _check_heads(self, attribute: Any, value: Any) -> None:
        heads = [head for layer in value for head in layer] if isinstance(value, tuple) else None
        if value is not None and (heads is None or not all(type(head) is int and head >= 0 for head in heads)):
            raise ConfigError(
                f"StaticHeads.full_heads must be None or a tuple of KV heads for each layer, as in ((0, 2), ()), "
                f"got {value!r}"
            )

    @property
    def reads_prompt(self) -> bool:  # type: ignore[override]
        return self.full_heads is None

    def init(self, layout: LayerLayout) -> StaticHeadsState:
        """Raises ConfigError where the given heads do not fit the model."""
        nobody = torch.zeros(layout.batch_size, layout.num_kv_heads, dtype=torch.bool, device=layout.device)
        if self.full_heads is None:
            return StaticHeadsState(nobody=nobody, full=None)
        if len(self.full_heads) != layout.num_layers:
            raise ConfigError(
                f"StaticHeads.full_heads has {len(self.full_heads)} layers, the model has {layout.num_layers}; give a "
                "tuple for every layer, empty where no head is a retrieval head"
            )
        own = self.full_heads[layout.layer_idx]
        if own and max(own) >= layout.num_kv_heads:
            raise ConfigError(
                f"StaticHeads.full_heads names KV head {max(own)} in layer {layout.layer_idx}, the model has heads 0 "
                f"to {layout.num_kv_heads - 1}"
            )
        full = nobody.clone()
        full[:, list(own)] = True
        return StaticHeadsState(nobody=nobody, full=full)

    def observe_prompt(self, prompt: PromptInputs, state: StaticHeadsState) -> None:
        layout, board = prompt.layout, prompt.board
        if (_SCORES, layout.layer_idx) not in board:
            board[_SCORES, layout.layer_idx] = torch.zeros(
                layout.batch_size, layout.num_kv_heads, dtype=torch.float64, device=layout.device
            )
        board[_SCORES, layout.layer_idx][prompt.batch] = self._shares(prompt)

    def _shares(self, prompt: PromptInputs) -> Tensor:
        """What of the last queries' attention goes neither to sinks nor to recent tokens, [H]."""
        query = prompt.query[:, -self.num_queries :]
        num_queries, num_keys = query.shape[1], prompt.keys.shape[1]
        order = prompt.positions().argsort(-1)
        keys = prompt.keys.gather(1, order[..., None].expand_as(prompt.keys))
        alive = None if prompt.alive is None else prompt.alive.gather(1, order)
        shares = []
        # What is recent differs from query to query.
        for place in range(num_queries):
            stop = num_keys - num_queries + place + 1
            left = None if alive is None else alive[:, :stop]
            weights = attention_sums(query[:, place : place + 1], keys[:, :stop], prompt.layout.sm_scale, left)
            shares.append(weights[..., self.sink_size : max(self.sink_size, stop - self.recent_size)].sum(-1).mean(1))
        return torch.stack(shares).double().mean(0)

    def begin(self, query: Tensor, state: StaticHeadsState) -> None:
        if self.full_heads is None:
            state.full = None

    def step(self, inputs: StepInputs, state: StaticHeadsState) -> Decision:
        if state.full is None:
            assert inputs.board is not None
            state.full = self._retrieval_heads(inputs.board, inputs.layout)
        return Decision(due=state.nobody, full=state.full)

    def _retrieval_heads(self, board: Board, layout: LayerLayout) -> Tensor:
        """bool [B, H]: this layer's among the heads with the highest scores of all layers; all where no prompt was
        read."""
        if (_SCORES, layout.layer_idx) not in board:
            return torch.ones(layout.batch_size, layout.num_kv_heads, dtype=torch.bool, device=layout.device)
        layers = sorted(layer for kind, layer in board if kind == _SCORES)
        scores = torch.cat([board[_SCORES, layer] for layer in layers], 1)  # [B, all heads]
        num_full = scores.shape[1] - round(self.sparsity * scores.shape[1])
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :num_full]
        full = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        own = layers.index(layout.layer_idx) * layout.num_kv_heads
        return full[:, own : own + layout.num_kv_heads].clone()
