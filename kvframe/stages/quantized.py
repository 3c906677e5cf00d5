"""A host pool in a few bits."""

from typing import ClassVar, Literal

from attrs import field, frozen

from kvframe.memory.codec import Codec
from kvframe.memory.pool import RowStore
from kvframe.memory.quantized import KiviCodec, QuantizedPool
from kvframe.stages.transfer import Transfer
from kvframe.types import Invariant, LayerLayout
from kvframe.validators import integer, one_of


@frozen(kw_only=True)
class QuantizedHostPool(Transfer):
    """All KV in host memory in a few bits, decoded on the way in; keys per channel, values per token, as in KIVI.

    KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, 2024, arXiv 2402.02750. Sinks, window and tokens that
    stay resident when they leave the window are attended as they were; the paper keeps a residual of recent tokens
    whole. Steps and offsets of a prompt's keys stay on the device, those of values travel with their row. Where the
    paper waits until generated tokens fill a group, their keys are rounded per token here, because every token is
    written through as it comes.
    """

    name: ClassVar[str] = "quantized-host-pool"
    capturable: ClassVar[bool] = True
    waives: ClassVar[frozenset[Invariant]] = frozenset({Invariant.EXACT_KV, Invariant.ATTENDED_ONLY})
    bits: Literal[2, 4, 8] = field(default=4, validator=one_of(2, 4, 8))
    """Of a number."""
    group_size: int = field(default=32, validator=integer(at_least=1))
    """Tokens, or channels, that share a step."""

    def codec(self, layout: LayerLayout) -> Codec:
        return self._codec(layout)

    def _codec(self, layout: LayerLayout) -> KiviCodec:
        return KiviCodec(layout=layout, bits=self.bits, group_size=self.group_size)

    def init(self, layout: LayerLayout, num_rows: int) -> RowStore:
        return QuantizedPool(layout, num_rows, self._codec(layout))

    def row_bytes(self, layout: LayerLayout) -> int:
        return self._codec(layout).encoded_layout.row_bytes

    def host_bytes(self, layout: LayerLayout, num_rows: int) -> int:
        return layout.batch_size * layout.num_kv_heads * num_rows * self.row_bytes(layout)
