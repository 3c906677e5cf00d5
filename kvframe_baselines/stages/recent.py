"""The last tokens of a text, as running state of a scorer."""

import torch
from attrs import define
from torch import Tensor

from kvframe.types import LayerLayout


@define(eq=False)
class RecentTokens:
    """Queries [B, W, Hq, D] and keys [B, W, H, D] of the last W tokens, in a ring; and how many there were."""

    queries: Tensor
    keys: Tensor
    count: Tensor  # int64 [B]

    @classmethod
    def none(cls, layout: LayerLayout, size: int) -> "RecentTokens":
        """Before the first token."""
        device = layout.device
        shape = (layout.batch_size, size)
        return cls(
            queries=torch.zeros(*shape, layout.num_qo_heads, layout.head_dim, dtype=layout.dtype, device=device),
            keys=torch.zeros(*shape, layout.num_kv_heads, layout.head_dim, dtype=layout.dtype, device=device),
            count=torch.zeros(layout.batch_size, dtype=torch.int64, device=device),
        )

    def append(self, query: Tensor, key: Tensor) -> None:
        """One token of every sequence: [B, Hq, D] and [B, H, D]."""
        place = (self.count % self.queries.shape[1])[:, None, None, None]
        for ring, own in ((self.queries, query), (self.keys, key)):
            ring.scatter_(1, place.expand(-1, -1, *own.shape[1:]), own[:, None])
        self.count.add_(1)

    def extend(self, batch: int, queries: Tensor, keys: Tensor) -> None:
        """Tokens of one sequence: [Hq, T, D] and [H, T, D]."""
        num_tokens, size = queries.shape[1], self.queries.shape[1]
        kept = min(num_tokens, size)
        places = (self.count[batch] + torch.arange(num_tokens - kept, num_tokens, device=keys.device)) % size
        self.queries[batch, places] = queries[:, num_tokens - kept :].transpose(0, 1)
        self.keys[batch, places] = keys[:, num_tokens - kept :].transpose(0, 1)
        self.count[batch] += num_tokens

    def ordered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, Hq, W, D] and keys [B, H, W, D], the newest last, and bool [B, W]: which of them there are."""
        size = self.queries.shape[1]
        steps = torch.arange(size, device=self.count.device)
        place = ((self.count[:, None] + steps) % size)[..., None, None]
        queries = self.queries.gather(1, place.expand_as(self.queries)).transpose(1, 2)
        keys = self.keys.gather(1, place.expand_as(self.keys)).transpose(1, 2)
        return queries, keys, steps >= size - self.count[:, None]
