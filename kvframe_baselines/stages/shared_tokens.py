"""Scores that a dense layer has computed for the layers behind it."""

from typing import Any, ClassVar

import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.stages import Scorer
from kvframe.stages.scorer import Index
from kvframe.types import Board, LayerLayout, LeavingUnits, ModelLayout, PromptInputs, StepInputs, UnitTable
from kvframe.validators import integers, one_of


@frozen(kw_only=True)
class SharedTokens(Scorer):
    """A token's score is its attention in the last filter layer before: OmniKV (2025, ICLR 2025).

    Filter layers attend in full, so they are dense. In every step each scores all tokens, by the largest product with
    any of its query heads; all heads of the layers up to the next filter go by these scores, a unit by its best token.
    """

    name: ClassVar[str] = "shared-tokens"
    capturable: ClassVar[bool] = True
    reads_prompt: ClassVar[bool] = True
    filter_layers: tuple[int, ...] = field(default=(2, 8, 18), validator=integers(at_least=0))
    """Dense layers whose scores serve those behind them, ascending."""
    softmax: bool = field(default=False, validator=one_of(True, False))
    """Normalise each query head over all tokens before the largest is taken."""

    @filter_layers.validator
    def _check_order(self, attribute: Any, value: tuple[int, ...]) -> None:
        if not value or list(value) != sorted(set(value)):
            raise ConfigError(f"SharedTokens.filter_layers must be layers in ascending order, got {value!r}")

    @property
    def sources(self) -> tuple[int, ...]:
        return self.filter_layers

    @property
    def num_notes(self) -> int:
        return 1  # a token's position, as its row may be another

    def init(self, layout: LayerLayout) -> int:
        """The filter layer that serves this one.

        Raises ConfigError for a layer before the first of them.
        """
        before = [layer for layer in self.filter_layers if layer < layout.layer_idx]
        if not before:
            raise ConfigError(
                f"layer {layout.layer_idx} retrieves, but SharedTokens has no filter layer before it, the first is "
                f"{self.filter_layers[0]}; make it a dense layer, or filter earlier"
            )
        return before[-1]

    def observe_prompt(self, prompt: PromptInputs, state: int) -> None:
        num_new, num_tokens = prompt.query.shape[1], prompt.keys.shape[1]
        prompt.notes[0, :, num_tokens - num_new :] = torch.arange(
            num_tokens - num_new, num_tokens, dtype=prompt.notes.dtype, device=prompt.notes.device
        )

    def probe(self, inputs: StepInputs, state: int) -> Tensor:
        assert inputs.notes is not None and inputs.num_tokens is not None
        position = inputs.num_tokens[..., None] - 1
        inputs.notes[0].scatter_(-1, position, position.to(inputs.notes.dtype))
        return inputs.query

    def publish(self, query: Tensor, keys: Tensor, lengths: Tensor, layout: LayerLayout, board: Board) -> None:
        """float [B, L] by position, -inf for tokens that do not exist."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        grouped = (query * layout.sm_scale).view(layout.batch_size, layout.num_kv_heads, -1, layout.head_dim)
        scores = torch.matmul(grouped, keys.transpose(2, 3)).to(dtype)  # [B, H, G, L]
        exists = torch.arange(keys.shape[2], device=keys.device) < lengths[:, None, None, None]
        scores = scores.masked_fill(~exists, -torch.inf)
        board["token scores", layout.layer_idx] = (scores.softmax(-1) if self.softmax else scores).amax((1, 2))

    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        return {}

    def extend(self, index: Index, unit: LeavingUnits) -> None:
        pass

    def score(self, inputs: StepInputs, index: Index, units: UnitTable) -> Tensor:
        assert inputs.notes is not None and inputs.board is not None
        published = inputs.board.get(("token scores", inputs.state))
        if published is None:
            raise ConfigError(
                f"SharedTokens waits for the scores of layer {inputs.state}, which has none: a filter layer has to be "
                "a dense one"
            )
        position = inputs.notes[0].long().clamp(max=published.shape[-1] - 1)
        by_row = published[:, None].expand(-1, position.shape[1], -1).gather(-1, position)
        return units.of_rows(by_row, "amax")


def problems_of(policy: Policy, layout: ModelLayout) -> list[str]:
    """Why filter layers of a policy's scorer cannot serve, for `kvframe_check_policy`."""
    filters = policy.scorer.sources
    if not isinstance(policy.scorer, SharedTokens) or policy.dense_layers == "all":
        return []
    problems = [
        f"SharedTokens filters in layer {layer}, which is not dense; add it to dense_layers, or take another layer"
        for layer in filters
        if layer in layout.retrieval_layers and not policy.is_dense(layer)
    ]
    problems += [
        f"SharedTokens filters in layer {layer}, which has no full KV cache; those that have: "
        f"{', '.join(map(str, layout.retrieval_layers))}"
        for layer in filters
        if layer not in layout.retrieval_layers
    ]
    early = [layer for layer in layout.retrieval_layers if layer < filters[0] and not policy.is_dense(layer)]
    if early:
        problems.append(
            f"layer {early[0]} retrieves before the first filter layer of SharedTokens, {filters[0]}; make it dense, "
            "or filter earlier"
        )
    return problems
