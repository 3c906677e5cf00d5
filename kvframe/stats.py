"""Counters of one retrieval layer, device tensors that nobody reads during decoding."""

import torch
from torch import Tensor

from kvframe.types import LayerLayout
from kvframe_kernels.append_token import NUM_COUNTS


class RetrievalStats:
    """Sums over decode steps; [B, H] each."""

    def __init__(self, layout: LayerLayout) -> None:
        heads = (layout.batch_size, layout.num_kv_heads)
        self.num_steps = 0
        self.count_sums = torch.zeros(NUM_COUNTS, *heads, dtype=torch.int64, device=layout.device)
        """Sums of the ledger's counts: tokens attended, by kind."""
        self.selections = torch.zeros(heads, dtype=torch.int64, device=layout.device)
        """Steps at which a head selected anew."""
        self.rows_selected = torch.zeros(heads, dtype=torch.int64, device=layout.device)
        """Rows that selections asked for, resident or not."""

    def count_selection(self, count: Tensor, due: Tensor) -> None:
        """A selection of `count` [B, H] rows was made where `due`."""
        self.selections += due
        self.rows_selected += count * due

    def count_step(self, counts: Tensor) -> None:
        """One decode step, with the ledger's counts after it."""
        self.num_steps += 1
        self.count_sums += counts

    def reset(self) -> None:
        """As at the start, in place."""
        self.num_steps = 0
        self.count_sums.zero_()
        self.selections.zero_()
        self.rows_selected.zero_()
