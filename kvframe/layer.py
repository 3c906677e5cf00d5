"""What the cache asks of one attention layer, whichever way it keeps its KV."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from kvframe.errors import NonFiniteError
from kvframe.types import LayerLayout


class LayerRuntime(ABC):
    """Holds one layer's KV and attends over it."""

    def __init__(self, layout: LayerLayout) -> None:
        self.layout = layout
        self._finite = torch.ones(layout.batch_size, layout.num_kv_heads, dtype=torch.bool, device=layout.device)

    @property
    @abstractmethod
    def lengths(self) -> list[int]:
        """Real tokens of every sequence."""

    @abstractmethod
    def reserve(self, num_rows: int) -> None:
        """Make room for this many tokens a sequence."""

    def prefetch(self, num_real: list[int]) -> None:  # noqa: B027, most have nothing to fetch
        """A hint: `prompt` with so many tokens of every sequence comes next on this device."""

    @abstractmethod
    def prompt(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        num_real: list[int],
        num_committed: int,
        ahead: Callable[[], None] | None = None,
    ) -> Tensor:
        """Tokens of a prompt, of a chunk of one, or of a turn's text: attended in full.

        query: [B, Hq, T, D]; keys: [B, H, T, D]; values: [B, H, T, Dv]; the last `num_real[b]` of row b are not
        padding.
        num_committed: tokens behind it are only proposed and may be cropped.
        ahead: called before attention is queued, once this layer's own KV is on its way.
        Returns [B, Hq, T, Dv], zero at padding.
        """

    def decode(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One generated token of every sequence, and perhaps proposed ones behind it; shapes as in `prompt`."""
        self.prepare_decode(keys.shape[2])
        out = self.step(query, keys, values)
        self.count_decoded(keys.shape[2])
        return out

    @abstractmethod
    def prepare_decode(self, num_tokens: int) -> None:
        """What has to happen before `num_tokens` are decoded, allocations included."""

    @abstractmethod
    def step(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The device's part of `decode`. On a CUDA device, for one token, it neither reads a device value nor changes
        anything that the host knows, so that a CUDA graph can repeat it."""

    @abstractmethod
    def count_decoded(self, num_tokens: int) -> None:
        """The host's part: a step was taken, here or by a graph."""

    @abstractmethod
    def steps_left(self) -> int:
        """Tokens that can be decoded before something has to be allocated."""

    @abstractmethod
    def addresses(self) -> list[int]:
        """What differs if a tensor that `step` works on was allocated anew."""

    @abstractmethod
    def crop(self, num_tokens: int) -> None:
        """Take the last tokens of every sequence back."""

    @abstractmethod
    def reset(self) -> None:
        """As at the start, in place: what was allocated is used again."""

    @abstractmethod
    def attended_positions(self, batch: int, head: int) -> Tensor:
        """Positions that the last decode step attended to, int64, ascending."""

    @abstractmethod
    def device_bytes(self) -> int:
        """Device memory held for KV."""

    @abstractmethod
    def host_bytes(self) -> int:
        """Host memory held for KV."""

    @abstractmethod
    def index_bytes(self) -> int:
        """Device memory held for finding units: summaries, boundaries and counters."""

    def check_finite(self, keys: Tensor, values: Tensor, num_real: list[int]) -> None:
        """Remember heads with NaN or infinity among real keys or values; raise at once where looking is free."""
        on_cpu = self.layout.device.type == "cpu"
        if on_cpu and math.isfinite(float(keys.sum()) + float(values.sum())):
            return  # a finite sum has only finite terms, and is far cheaper to ask for
        if min(num_real) == keys.shape[2]:
            for tensor in (keys, values):
                # The largest magnitude, in one pass over the memory: NaN prevails over every number.
                self._finite &= torch.linalg.vector_norm(tensor, math.inf, dim=(2, 3)).isfinite()
        else:
            finite = torch.isfinite(keys).all(-1) & torch.isfinite(values).all(-1)  # [B, H, T]
            ages = torch.arange(keys.shape[2], 0, -1, device=keys.device)
            finite |= ages > torch.tensor(num_real, device=keys.device)[:, None, None]
            self._finite &= finite.all(-1)
        if on_cpu:
            self.raise_if_not_finite()

    def raise_if_not_finite(self) -> None:
        """Raise NonFiniteError naming layer and head; reads the device."""
        if bool(self._finite.all()):
            return
        batch, head = (int(index) for index in (~self._finite).nonzero()[0])
        self._finite.fill_(True)
        raise NonFiniteError(
            f"layer {self.layout.layer_idx}, KV head {head}, batch row {batch}: expected finite keys and values, "
            "got NaN or infinity; check the model's weights and its dtype (float16 has a small range, bfloat16 has not)"
        )
