"""Plain torch definitions of `advance_ledger` and `find_leaving`.

The counters of one layer are one tensor, int64 [NUM_COUNTS, B, H]: a kernel takes one pointer, and one addition
accumulates all of them for the report.
"""

from torch import Tensor

LENGTH = 0  # tokens of the row so far; the next token's position
SINKS = 1  # tokens held as sinks
RESIDENT = 2  # recalled or kept rows in the resident slots
WINDOW = 3  # tokens held in the ring: all since the start of the oldest unit that has not left
OPEN = 4  # tokens of the open unit
UNITS = 5  # units that have left the window and are in the index
CLOSED = 6  # units with a fixed end; those from UNITS on still lie in the window
NUM_COUNTS = 7


def advance_ledger_reference(
    counts: Tensor, unit_offsets: Tensor, cut: Tensor | None, min_size: int, max_size: int, sink_size: int
) -> None:
    """Close the open unit where that is due or where it is full, then take one token in; in place.

    counts: int64 [NUM_COUNTS, B, H]; unit_offsets: int64 [B, H, max_units + 2], closed unit u is the rows
    [unit_offsets[u], unit_offsets[u + 1]); the last entry takes the proposal behind the last unit there is room for.
    cut: bool [B, H], a boundary before this token; it closes the unit only if that holds `min_size` tokens, otherwise
    the unit goes on growing. None where nothing is due anywhere.
    """
    length, sinks, window = counts[LENGTH], counts[SINKS], counts[WINDOW]
    open_size, closed = counts[OPEN], counts[CLOSED]
    close = open_size >= max_size
    if cut is not None:
        close |= cut & (open_size >= min_size)
    # Written everywhere: behind the last closed unit the entry is only a proposal, overwritten by the next step.
    unit_offsets.scatter_(-1, (closed + 1)[..., None], length[..., None])
    closed += close
    open_size.masked_fill_(close, 0)
    is_sink = length < sink_size
    sinks += is_sink
    in_window = ~is_sink
    window += in_window
    open_size += in_window
    length += 1


def find_leaving_reference(
    counts: Tensor, unit_offsets: Tensor, window_size: int, length: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The oldest closed unit of each head, where all of it lies before the last `window_size` tokens.

    `length` [B, H] replaces the ledger's own where the caller makes room for tokens that are about to come.
    Returns (leaves bool, start int64, size int64), [B, H] each; start and size mean something only where `leaves`.
    """
    units = counts[UNITS]
    start = unit_offsets.gather(-1, units[..., None])[..., 0]
    end = unit_offsets.gather(-1, (units + 1).clamp(max=unit_offsets.shape[-1] - 1)[..., None])[..., 0]
    leaves = (units < counts[CLOSED]) & (end <= (counts[LENGTH] if length is None else length) - window_size)
    return leaves, start, end - start
