"""The ledger step: one token enters, unit boundaries and counters move on, a unit may leave the window."""

from torch import Tensor

from kvframe_kernels.append_token.reference import (
    CLOSED,
    LENGTH,
    NUM_COUNTS,
    OPEN,
    RESIDENT,
    SINKS,
    UNITS,
    WINDOW,
    Appended,
    Slots,
    append_token_reference,
)
from kvframe_kernels.append_token.reference import advance_ledger_reference as advance_ledger
from kvframe_kernels.append_token.reference import find_leaving_reference as find_leaving
from kvframe_kernels.append_token.reference import leave_window_reference as leave_window
from kvframe_kernels.dispatch import Backend, choose, float_reason, width_reason

__all__ = [
    "CLOSED",
    "LENGTH",
    "NUM_COUNTS",
    "OPEN",
    "RESIDENT",
    "SINKS",
    "UNITS",
    "WINDOW",
    "Appended",
    "Slots",
    "advance_ledger",
    "append_token",
    "append_token_reference",
    "find_leaving",
    "leave_window",
]


def append_token(
    counts: Tensor,
    unit_offsets: Tensor,
    cut: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Slots,
    finite: Tensor | None,
    *,
    window_size: int,
    min_size: int,
    max_size: int,
    backend: Backend = "auto",
) -> Appended:
    """`append_token_reference`, by the chosen backend."""
    reason = float_reason(keys, values) or width_reason(keys.shape[-1], values.shape[-1])
    if choose("append_token", keys, backend, reason, kernels=("triton",)) == "reference":
        return append_token_reference(
            counts, unit_offsets, cut, keys, values, slots, finite,
            window_size=window_size, min_size=min_size, max_size=max_size,
        )  # fmt: skip
    from kvframe_kernels.append_token.triton_kernel import append_token_triton

    return append_token_triton(
        counts, unit_offsets, cut, keys, values, slots, finite, window_size, min_size, max_size
    )  # fmt: skip
