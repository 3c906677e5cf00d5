"""What the runtime asks of a layer's memory."""

from abc import ABC, abstractmethod

from torch import Tensor

from kvframe.memory.pool import Traffic
from kvframe.types import Candidates, LeavingUnits, UnitTable
from kvframe_kernels.slot_attention import Entries


class LayerMemory(ABC):
    """Holds the KV of one retrieval layer, and knows which of it attention sees.

    Two of them run the same ledger and the same stages: `SlotMemory` (resident slots and a store behind them) and
    `DenseMemory` (everything on the device, attention under a mask).
    """

    @property
    @abstractmethod
    def traffic(self) -> Traffic:
        """What has moved."""

    @abstractmethod
    def reserve(self, num_rows: int) -> None:
        """Make room for at least `num_rows` tokens a sequence."""

    def prefetch(self, batch: int, stop: int, room: int) -> None:  # noqa: B027, a hint may be ignored
        """`read` will be called with these arguments before it is with others."""

    @abstractmethod
    def read(self, batch: int, stop: int, room: int = 0) -> Tensor:
        """Rows [0, stop) of one sequence on the device, and behind them room for the caller to fill: [H, stop + room,
        D + Dv], K and V of a token side by side. Valid until the read after the next one."""

    @abstractmethod
    def read_range(self, batch: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of one sequence that have left the window, [H, stop - start, D + Dv], as the store gives
        them back."""

    @abstractmethod
    def reorder(self, batch: int, start: int, order: Tensor, rows: Tensor) -> None:
        """Rows [start, start + n) of one sequence are stored anew as `rows` [H, n, D + Dv], as `stage` made room for:
        row start + i of a head is what was row start + order[i]; order int64 [H, n]. Attention sees what it saw."""

    @abstractmethod
    def recent(self, batch: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Positions [start, stop) of one sequence, all inside the window: [H, n, D], [H, n, Dv]."""

    @abstractmethod
    def stage(self, num_tokens: int) -> Tensor:
        """Room on the device for a prompt block, [H, num_tokens, D + Dv], to be filled and handed to `store_block`."""

    @abstractmethod
    def store_block(self, batch: int, start: int, rows: Tensor) -> None:
        """A prompt block in unit order: rows [start, start + n) of one sequence, as `stage` made room for."""

    @abstractmethod
    def store_recent(self, batch: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Prompt tokens that stay sinks or stay in the window: positions [start, start + n)."""

    @abstractmethod
    def finish_prompt(self) -> None:
        """The ledger of every sequence is up to date; show attention just what it says."""

    def begin_decode(self) -> None:  # noqa: B027, not every memory has something on its way
        """Steps come now. What still is on its way to the host need not be waited for any earlier: the next layer of
        the prompt computes meanwhile."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, cut: Tensor | None, finite: Tensor | None) -> LeavingUnits:
        """One token of every sequence enters the ledger and the window; the oldest unit of each head that then lies
        before the window leaves it, and its first tokens become resident while there is room.

        keys [B, H, D], values [B, H, Dv]; cut: bool [B, H], a unit ends before this token; finite: bool [B, H], set to
        False for a head whose key or value is not; None where that was checked before.
        """

    @abstractmethod
    def leave(self, length: Tensor) -> LeavingUnits | None:
        """The same for sequences that are about to have `length` [B, H] tokens; None where nothing leaves.

        Reads the device.
        """

    @abstractmethod
    def recall(self, rows: Tensor, count: Tensor, due: Tensor, tallies: Tensor) -> None:
        """Where `due`, make exactly `rows` [B, H, C] (-1 behind `count` [B, H]) resident; count that in `tallies`."""

    @abstractmethod
    def attend(self, query: Tensor, tail: tuple[Tensor, Tensor] | None, entries: Entries | None = None) -> Tensor:
        """Attention over sinks, resident rows and window; and causally over `tail`, tokens not yet in the ledger.

        query: [B, Hq, T, D]. The first query sees none of the tail, query t its first t tokens.
        tail: keys [B, H, T - 1, D], values [B, H, T - 1, Dv].
        entries: virtual entries, all of which every query sees.
        Returns [B, Hq, T, Dv].
        """

    @abstractmethod
    def attend_to_all(self, query: Tensor, lengths: list[int]) -> Tensor:
        """Attention of one query over everything stored, `lengths` tokens of every sequence, as the store gives it
        back; query [B, Hq, 1, D], returns [B, Hq, 1, Dv]."""

    @abstractmethod
    def attended(self) -> Tensor:
        """bool [B, H, R]: the rows that attention sees."""

    @abstractmethod
    def weights(self, query: Tensor, full: Tensor | None, lengths: list[int]) -> Tensor:
        """What every row gets of a query [B, Hq, D]: [B, H, G, R] in at least float32, 0 for a row not attended to.

        full: bool [B, H], heads that attend to everything stored; None where none does.
        """

    @abstractmethod
    def unattended(self, units: UnitTable) -> Tensor:
        """Whole numbers [B, H, U]: tokens of each unit that attention does not see; 0 where there is no unit."""

    @abstractmethod
    def kept_lse(self, query: Tensor) -> Tensor:
        """Log-sum-exp of the scaled scores of sinks and window, [B, Hq] in at least float32; query [B, Hq, D]."""

    @abstractmethod
    def missed_share(self, candidates: Candidates) -> Tensor:
        """The largest share of a candidate that is not resident, [B, H]; 0 where there is none."""

    def step_is_over(self) -> None:  # noqa: B027, most have nothing to do
        """A decode step has attended; what it did not keep may be let go where the store drops."""

    @abstractmethod
    def attended_rows(self, batch: int, head: int) -> Tensor:
        """Rows that attention sees, int64, in no order; a row twice would be an error."""

    @abstractmethod
    def reset(self) -> None:
        """As at the start, in place; what has been counted stays."""

    def clear_traffic(self) -> None:
        """Start to count anew."""
        self.traffic.clear()

    @abstractmethod
    def device_bytes(self) -> int:
        """Device memory held for KV."""

    def index_bytes(self) -> int:
        """Device memory held for finding rows."""
        return 0

    @abstractmethod
    def host_bytes(self) -> int:
        """Host memory held for KV."""
