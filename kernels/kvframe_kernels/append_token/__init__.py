"""The ledger step: one token enters, unit boundaries and counters move on."""

from kvframe_kernels.append_token.reference import (
    CLOSED,
    LENGTH,
    NUM_COUNTS,
    OPEN,
    RESIDENT,
    SINKS,
    UNITS,
    WINDOW,
)
from kvframe_kernels.append_token.reference import advance_ledger_reference as advance_ledger
from kvframe_kernels.append_token.reference import find_leaving_reference as find_leaving

__all__ = [
    "CLOSED",
    "LENGTH",
    "NUM_COUNTS",
    "OPEN",
    "RESIDENT",
    "SINKS",
    "UNITS",
    "WINDOW",
    "advance_ledger",
    "find_leaving",
]
