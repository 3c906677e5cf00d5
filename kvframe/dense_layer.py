"""A layer that keeps its whole KV on the device and attends to all of it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvframe.attention import causal_attention
from kvframe.layer import LayerRuntime
from kvframe.types import LayerLayout
from kvframe_kernels.slot_attention import make_arrivals, slot_attention

_SLAB_ROWS = 1024


class DenseLayer(LayerRuntime):
    """One buffer of the planned capacity, and a length a sequence. Padding is not stored.

    The host knows the lengths; on a device they lie there as well, for steps that a CUDA graph repeats.

    publish: called in every decode step with query [B, Hq, D], keys [B, H, L, D], lengths [B] on the device and the
    layout, for layers behind this one; None where nobody asks.
    """

    def __init__(
        self,
        layout: LayerLayout,
        capacity: int,
        publish: Callable[[Tensor, Tensor, Tensor, LayerLayout], Any] | None = None,
    ) -> None:
        super().__init__(layout)
        self._publish = publish
        self._keys, self._values = layout.zeros(capacity)
        self._lengths = [0] * layout.batch_size
        self._stored = torch.zeros(layout.batch_size, dtype=torch.int64, device=layout.device)
        self._arrivals = make_arrivals(layout.batch_size, layout.num_qo_heads, layout.device)

    @property
    def lengths(self) -> list[int]:
        return list(self._lengths)

    def _set_lengths(self, lengths: list[int]) -> None:
        self._lengths = lengths
        for batch, length in enumerate(lengths):
            self._stored[batch].fill_(length)

    def reserve(self, num_rows: int) -> None:
        capacity = self._keys.shape[2]
        if num_rows > capacity:
            # More than was planned: in steps that are large enough to be rare, because everything is copied.
            keys, values = self.layout.zeros(max(num_rows, capacity + _SLAB_ROWS) - capacity)
            self._keys, self._values = torch.cat([self._keys, keys], 2), torch.cat([self._values, values], 2)

    def prompt(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        num_real: list[int],
        num_committed: int,
        ahead: Callable[[], None] | None = None,
    ) -> Tensor:
        self.check_finite(keys, values, num_real)
        stops = [length + num for length, num in zip(self._lengths, num_real, strict=True)]
        self.reserve(max(stops))
        self._store(keys, values, stops)
        self._set_lengths(stops)
        if ahead is not None:
            ahead()
        return self._attend(query, num_real, stops)

    def _store(self, keys: Tensor, values: Tensor, stops: list[int]) -> None:
        for batch, (start, stop) in enumerate(zip(self._lengths, stops, strict=True)):
            own = slice(keys.shape[2] - (stop - start), keys.shape[2])
            self._keys[batch, :, start:stop] = keys[batch, :, own]
            self._values[batch, :, start:stop] = values[batch, :, own]

    def prepare_decode(self, num_tokens: int) -> None:
        self.reserve(max(self._lengths) + num_tokens)

    def step(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        num_new = keys.shape[2]
        num_real = [num_new] * keys.shape[0]
        self.check_finite(keys, values, num_real)
        if num_new > 1 or self.layout.device.type == "cpu":
            stops = [length + num_new for length in self._lengths]
            self._store(keys, values, stops)
            self._stored += num_new
            if self._publish is not None:
                # Layers behind retrieve for the first token only; the others are proposals.
                self._publish(query[:, :, 0], self._keys[:, :, : max(stops)], self._stored - num_new + 1, self.layout)
            return self._attend(query, num_real, stops)
        place = self._stored[:, None, None, None].expand(-1, self.layout.num_kv_heads, 1, -1)
        self._keys.scatter_(2, place.expand(-1, -1, -1, keys.shape[-1]), keys)
        self._values.scatter_(2, place.expand(-1, -1, -1, values.shape[-1]), values)
        self._stored += 1
        if self._publish is not None:
            self._publish(query[:, :, 0], self._keys, self._stored, self.layout)
        return slot_attention(
            query, self._keys, self._values, None, self.layout.sm_scale,
            lengths=self._stored, arrivals=self._arrivals,
        )[0]  # fmt: skip

    def count_decoded(self, num_tokens: int) -> None:
        self._lengths = [length + num_tokens for length in self._lengths]

    def steps_left(self) -> int:
        return self._keys.shape[2] - max(self._lengths)

    def addresses(self) -> list[int]:
        return [self._keys.data_ptr()]

    def _attend(self, query: Tensor, num_real: list[int], lengths: list[int]) -> Tensor:
        """Attention of the last `num_real` tokens of every sequence of these lengths, causal."""
        num_queries, longest = query.shape[2], max(lengths)
        keys, values = self._keys[:, :, :longest], self._values[:, :, :longest]
        if num_queries == 1 and min(num_real) == 1:
            bias = None if min(lengths) == longest else self._bias(lengths)
            return slot_attention(query, keys, values, bias, self.layout.sm_scale)[0]
        if min(lengths) == longest and min(num_real) == num_queries:
            return causal_attention(query, keys, values, self.layout.sm_scale)
        out = query.new_zeros(*query.shape[:3], values.shape[-1])
        for batch, (num, length) in enumerate(zip(num_real, lengths, strict=True)):
            if num:
                row, own = slice(batch, batch + 1), slice(num_queries - num, num_queries)
                out[row, :, own] = causal_attention(
                    query[row, :, own], keys[row, :, :length], values[row, :, :length], self.layout.sm_scale
                )
        return out

    def _bias(self, lengths: list[int]) -> Tensor:
        stops = torch.tensor(lengths, device=self.layout.device)[:, None, None]
        behind = torch.arange(max(lengths), device=self.layout.device) >= stops
        bias = torch.zeros(behind.shape, dtype=self.layout.dtype, device=self.layout.device)
        return bias.masked_fill(behind, -math.inf).expand(-1, self.layout.num_kv_heads, -1)

    def crop(self, num_tokens: int) -> None:
        self._set_lengths([length - num_tokens for length in self._lengths])

    def reset(self) -> None:
        self._set_lengths([0] * self.layout.batch_size)

    def attended_positions(self, batch: int, head: int) -> Tensor:
        return torch.arange(self._lengths[batch])

    def device_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def host_bytes(self) -> int:
        return 0

    def index_bytes(self) -> int:
        return 0
