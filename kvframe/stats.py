"""Counters of one retrieval layer, device tensors that nobody reads during decoding."""

import torch
from torch import Tensor

from kvframe.types import LayerLayout
from kvframe_kernels.append_token import NUM_COUNTS
from kvframe_kernels.select_units import NUM_TALLIES, ROWS_RECALLED, ROWS_SELECTED, SELECTIONS


class RetrievalStats:
    """Sums over decode steps."""

    def __init__(self, layout: LayerLayout) -> None:
        heads = (layout.batch_size, layout.num_kv_heads)
        self.num_steps = 0
        self.count_sums = torch.zeros(NUM_COUNTS, *heads, dtype=torch.int64, device=layout.device)
        """Sums of the ledger's counts: tokens attended, by kind."""
        self.tallies = torch.zeros(NUM_TALLIES, *heads, dtype=torch.int64, device=layout.device)
        """What selections asked for and moved."""

    @property
    def selections(self) -> Tensor:
        """int64 [B, H], steps at which a head selected anew."""
        return self.tallies[SELECTIONS]

    @property
    def rows_selected(self) -> Tensor:
        """int64 [B, H], rows that selections asked for, resident or not."""
        return self.tallies[ROWS_SELECTED]

    @property
    def rows_recalled(self) -> Tensor:
        """int64 [B, H], rows of them that were not resident."""
        return self.tallies[ROWS_RECALLED]

    def add(self, counts: Tensor) -> None:
        """One decode step, with the ledger's counts after it; `num_steps` is the host's to count."""
        self.count_sums += counts

    def reset(self) -> None:
        """As at the start, in place."""
        self.num_steps = 0
        self.count_sums.zero_()
        self.tallies.zero_()
