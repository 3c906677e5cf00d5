"""The ids of all tokens, for stages that ask for them."""

import torch
from torch import Tensor


class TokenIds:
    """int64 [B, positions], on the device; padding does not count. One for all layers of a cache."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self._ids = torch.zeros(batch_size, 0, dtype=torch.int64, device=device)

    def enter(self, ids: Tensor, starts: list[int], num_real: list[int]) -> None:
        """A forward pass brings `ids` [B, T], the last `num_real` of each row behind `starts` tokens of that row.

        What lay at these positions before was cropped.
        """
        stops = [start + num for start, num in zip(starts, num_real, strict=True)]
        missing = max(stops) - self._ids.shape[1]
        if missing > 0:
            room = max(missing, self._ids.shape[1])  # doubles, so that one token at a time is cheap
            self._ids = torch.cat([self._ids, self._ids.new_zeros(self._ids.shape[0], room)], 1)
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            self._ids[row, start:stop] = ids[row, ids.shape[1] - (stop - start) :]

    def span(self, batch: int, start: int, stop: int) -> Tensor:
        """int64 [stop - start], ids of one sequence."""
        return self._ids[batch, start:stop]

    def at(self, positions: list[int]) -> Tensor:
        """int64 [B], the id of one position of every sequence."""
        return torch.stack([self._ids[row, position] for row, position in enumerate(positions)])
