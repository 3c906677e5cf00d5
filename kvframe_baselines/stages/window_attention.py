"""Scores by what the end of the prompt attends to."""

from typing import ClassVar, Literal

import torch
from attrs import define, field, frozen
from torch import Tensor

from kvframe.attention import attention_sums
from kvframe.types import LayerLayout, PromptInputs
from kvframe.validators import integer, odd, one_of
from kvframe_baselines.stages.noted import NotedScorer

_OBSERVING = 2.0
"""Note of the observing tokens themselves: more than any share of attention."""


@define(eq=False)
class _Window:
    """The last queries of each sequence's prompt."""

    queries: dict[int, Tensor]  # by sequence, [Hq, <= window, D]
    stops: dict[int, int]  # tokens of the sequence up to the last of them


@frozen(kw_only=True)
class WindowAttention(NotedScorer):
    """Attention weights from the last queries of a prompt, pooled along the text: SnapKV (2024, arXiv 2404.14469).

    The mean over the last `observation_window` queries, whose weights add up to 1 over all of the prompt; smoothed
    over neighbouring tokens, so that whole phrases are kept; then the mean over the query heads that share a KV head.
    The observing tokens themselves rank before all others, and what is generated later has no score.

    A prompt may come in chunks: queries are remembered, and the notes written anew, until no more comes. Of a later
    turn only its own text observes.
    """

    name: ClassVar[str] = "window-attention"
    reads_prompt: ClassVar[bool] = True
    observation_window: int = field(default=32, validator=integer(at_least=1))
    """Queries at the end of a prompt that are asked."""
    kernel_size: int = field(default=7, validator=[integer(at_least=1), odd])
    """Neighbouring tokens that are pooled; odd."""
    pooling: Literal["max", "mean"] = field(default="max", validator=one_of("max", "mean"))
    """What becomes of neighbours: the largest of them, or their mean, where beyond an end there are zeros."""

    @property
    def num_notes(self) -> int:
        return 1

    def init(self, layout: LayerLayout) -> _Window:
        return _Window(queries={}, stops={})

    def observe_prompt(self, prompt: PromptInputs, state: _Window) -> None:
        query = self._last_queries(prompt, state)
        num_seen, order = prompt.keys.shape[1] - query.shape[1], prompt.positions().argsort(-1)
        keys = prompt.keys.gather(1, order[..., None].expand_as(prompt.keys))  # by position
        alive = None if prompt.alive is None else prompt.alive.gather(1, order)
        shares = attention_sums(query, keys, prompt.layout.sm_scale, alive)[..., :num_seen] / query.shape[1]
        notes = prompt.notes.new_full((keys.shape[0], keys.shape[1]), _OBSERVING)
        if num_seen:
            notes[:, :num_seen] = self._pooled(shares).mean(1)
        prompt.notes[0].scatter_(1, order, notes)

    def _last_queries(self, prompt: PromptInputs, state: _Window) -> Tensor:
        """The observing queries [Hq, n, D], remembered for the chunk to come."""
        batch, query, stop = prompt.batch, prompt.query, prompt.keys.shape[1]
        if state.stops.get(batch) == stop - query.shape[1]:
            query = torch.cat([state.queries[batch], query], 1)
        query = query[:, -self.observation_window :]
        state.queries[batch], state.stops[batch] = query.clone(), stop
        return query

    def _pooled(self, shares: Tensor) -> Tensor:
        """Along the text; [H, G, n]."""
        pool = torch.nn.functional.max_pool1d if self.pooling == "max" else torch.nn.functional.avg_pool1d
        return pool(shares, self.kernel_size, stride=1, padding=self.kernel_size // 2)
