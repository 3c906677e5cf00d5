"""Named tensors of one length, which grows."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Columns:
    """Tensors [B, H, N + 1, ...]; the last column takes what belongs nowhere. There may be none of them.

    sample: one entry of each, [1, 1, ...], for its shape and dtype.
    """

    def __init__(self, heads: tuple[int, int], sample: Mapping[str, Tensor], num_columns: int) -> None:
        self.tensors = {
            name: torch.zeros(*heads, num_columns + 1, *entry.shape[2:], dtype=entry.dtype, device=entry.device)
            for name, entry in sample.items()
        }

    def reserve(self, num_columns: int) -> None:
        """Make room for at least this many."""
        for name, tensor in self.tensors.items():
            missing = num_columns + 1 - tensor.shape[2]
            if missing > 0:
                more = tensor.new_zeros(*tensor.shape[:2], missing, *tensor.shape[3:])
                self.tensors[name] = torch.cat([tensor, more], 2)

    def fit(self, num_columns: int) -> None:
        """Have room for just this many."""
        for name, tensor in self.tensors.items():
            if tensor.shape[2] > num_columns + 1:
                self.tensors[name] = tensor[:, :, : num_columns + 1].clone()
        self.reserve(num_columns)

    def clear(self) -> None:
        """Zero, so that what is read of an entry that does not exist is finite."""
        for tensor in self.tensors.values():
            tensor.zero_()

    def nbytes(self) -> int:
        """Device memory held."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
