"""`advance_ledger` and `find_leaving` against a ledger of Python lists."""

import torch
from attrs import define, field
from hypothesis import given
from hypothesis import strategies as st

from kvframe_kernels.append_token import (
    CLOSED,
    LENGTH,
    NUM_COUNTS,
    OPEN,
    RESIDENT,
    SINKS,
    UNITS,
    WINDOW,
    advance_ledger,
    find_leaving,
)

CANARY = -777


@define
class PlainHead:
    """One head's ledger: every unit is the list of its positions."""

    sink_size: int
    sinks: list[int] = field(factory=list)
    left: list[list[int]] = field(factory=list)
    pending: list[list[int]] = field(factory=list)
    open: list[int] = field(factory=list)

    @property
    def length(self) -> int:
        return len(self.sinks) + sum(map(len, self.left)) + len(self.window)

    @property
    def window(self) -> list[int]:
        return [position for unit in self.pending for position in unit] + self.open

    def advance(self, cut: bool, min_size: int, max_size: int) -> None:
        """Close the open unit where that is due or it is full, then take a token in."""
        position = self.length
        if len(self.open) >= max_size or (cut and len(self.open) >= min_size):
            self.pending.append(self.open)
            self.open = []
        (self.sinks if position < self.sink_size else self.open).append(position)

    def leave(self, window_size: int, length: int) -> list[int] | None:
        """The oldest closed unit in the window, where the last `window_size` tokens do not reach into it."""
        if self.pending and all(position < length - window_size for position in self.pending[0]):
            return self.pending[0]
        return None

    def counts(self) -> dict[int, int]:
        """The same as the ledger's counters, but for RESIDENT."""
        return {
            LENGTH: self.length,
            SINKS: len(self.sinks),
            WINDOW: len(self.window),
            OPEN: len(self.open),
            UNITS: len(self.left),
            CLOSED: len(self.left) + len(self.pending),
        }


def empty_ledger(num_heads: int, sink_size: int, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counters and offsets of one sequence at the start; what nobody has written is marked."""
    counts = torch.zeros(NUM_COUNTS, 1, num_heads, dtype=torch.int64)
    counts[RESIDENT] = CANARY
    offsets = torch.full((1, num_heads, num_steps + 2), CANARY)
    offsets[..., 0] = sink_size
    return counts, offsets


@given(
    num_steps=st.integers(1, 63),
    rate=st.floats(0, 0.6),
    min_size=st.integers(1, 5),
    more=st.integers(0, 5),
    sink_size=st.integers(0, 6),
    window_size=st.integers(1, 12),
    ahead=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
def test_definition(
    num_steps: int,
    rate: float,
    min_size: int,
    more: int,
    sink_size: int,
    window_size: int,
    ahead: int,
    seed: int,
):
    """Counters and boundaries are those of a ledger of lists at every step, and the same units leave."""
    generator = torch.Generator().manual_seed(seed)
    cuts: list[list[bool] | None] = (torch.rand(num_steps, 3, generator=generator) < rate).tolist()
    cuts = [None if not any(cut) and step % 2 else cut for step, cut in enumerate(cuts)]
    max_size = min_size + more
    heads = [PlainHead(sink_size) for _ in range(3)]
    counts, offsets = empty_ledger(3, sink_size, len(cuts))
    for cut in cuts:
        before = offsets.clone()
        advance_ledger(counts, offsets, None if cut is None else torch.tensor([cut]), min_size, max_size, sink_size)
        for index, head in enumerate(heads):
            proposal = len(head.left) + len(head.pending) + 1
            head.advance(cut is not None and cut[index], min_size, max_size)
            check_counters(counts, index, head)
            check_offsets(offsets, before, index, head, proposal)
        future = counts[LENGTH] + ahead
        expected = [head.leave(window_size, head.length + ahead) for head in heads]
        check_leaving(find_leaving(counts, offsets, window_size, future), expected)
        expected = [head.leave(window_size, head.length) for head in heads]
        leaves, _, size = find_leaving(counts, offsets, window_size)
        check_leaving(find_leaving(counts, offsets, window_size), expected)
        for head, unit in zip(heads, expected, strict=True):
            if unit is not None:
                head.left.append(head.pending.pop(0))
        counts[UNITS] += leaves
        counts[WINDOW] -= size * leaves


def check_counters(counts: torch.Tensor, index: int, head: PlainHead) -> None:
    """All counters as they should be; nobody touched RESIDENT."""
    assert {which: int(counts[which, 0, index]) for which in head.counts()} == head.counts()
    assert int(counts[RESIDENT, 0, index]) == CANARY


def check_offsets(offsets: torch.Tensor, before: torch.Tensor, index: int, head: PlainHead, proposal: int) -> None:
    """Closed units tile the rows from the sinks on; only the entry behind the last closed unit was written."""
    units = head.left + head.pending
    ends = [unit[-1] + 1 for unit in units]
    assert offsets[0, index, : len(units) + 1].tolist() == [head.sink_size, *ends]
    untouched = torch.arange(offsets.shape[-1]) != proposal
    assert torch.equal(offsets[0, index, untouched], before[0, index, untouched])


def check_leaving(actual: tuple[torch.Tensor, torch.Tensor, torch.Tensor], expected: list[list[int] | None]) -> None:
    """The units that leave, by their first position and size."""
    leaves, start, size = (part[0].tolist() for part in actual)
    assert leaves == [unit is not None for unit in expected]
    for index, unit in enumerate(expected):
        if unit is not None:
            assert (start[index], size[index]) == (unit[0], len(unit))


def test_full_table():
    """A table for one unit takes its end and one proposal behind it; the unit leaves as any other."""
    counts, offsets = empty_ledger(1, sink_size=0, num_steps=1)
    for _ in range(4):
        advance_ledger(counts, offsets, None, 2, 2, 0)

    assert offsets.tolist() == [[[0, 2, 3]]]
    leaves, start, size = find_leaving(counts, offsets, 1)
    assert (leaves.item(), start.item(), size.item()) == (True, 0, 2)
