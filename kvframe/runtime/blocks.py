"""Generated tokens that are grouped anew, block by block."""

from collections.abc import Iterator, Sequence

import torch
from attrs import define

from kvframe.stages import UnitBuilder


@define
class _Block:
    start: int
    """Of the first block that has not been grouped anew."""
    close_at: int
    """The next length at which a block ends."""


class OutputBlocks:
    """Runs of `size` generated tokens of every sequence that are grouped anew, one after the other; with None there
    are none.

    The host knows where they end, because every step brings one token.
    """

    def __init__(self, size: int | None, window_size: int) -> None:
        self._size = size or 0
        self._window_size = window_size
        self._blocks: list[_Block] = []

    def begin(self, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Tokens are generated now; what of each sequence comes from `starts` on is in blocks."""
        size = self._size
        if size:
            self._blocks = [
                _Block(start, start + size * ((length - start) // size + 1))
                for start, length in zip(starts, lengths, strict=True)
            ]

    def forget(self) -> None:
        """Nothing is generated."""
        self._blocks = []

    def closing(self, lengths: Sequence[int]) -> Iterator[int]:
        """Sequences in which a block ends here, each once."""
        for batch, (block, length) in enumerate(zip(self._blocks, lengths, strict=False)):
            if length == block.close_at:
                block.close_at += self._size
                yield batch

    def complete(self, lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Sequence, start and stop of each block that has left the window as a whole, each once."""
        for batch, (block, length) in enumerate(zip(self._blocks, lengths, strict=False)):
            while length >= self._complete_at(block):
                start, block.start = block.start, block.start + self._size
                yield batch, start, block.start

    def steps_left(self, lengths: Sequence[int]) -> int | None:
        """Tokens until a block ends or has left the window; None where there are no blocks."""
        left = [
            min(block.close_at, self._complete_at(block)) - length
            for block, length in zip(self._blocks, lengths, strict=False)
        ]
        return min(left, default=None)

    def _complete_at(self, block: _Block) -> int:
        return block.start + self._size + self._window_size


def units_of_regrouping(units: UnitBuilder, num_tokens: int) -> int:
    """So many units more can come of generated tokens where they are grouped anew in blocks."""
    size = units.regroup_size
    if size is None:
        return 0
    of_block = units.regroup(torch.zeros(1, size, 1)).sizes.shape[1]
    return (max(0, num_tokens) // size + 1) * (of_block + 1)  # one where the end of a block cuts a unit
