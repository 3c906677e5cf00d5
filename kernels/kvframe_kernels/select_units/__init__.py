"""Which rows a step attends to, and which of them have to travel."""

from torch import Tensor

from kvframe_kernels.append_token import Slots
from kvframe_kernels.dispatch import Backend, KernelError, choose, float_reason, is_debug
from kvframe_kernels.select_units.reference import (
    NUM_TALLIES,
    ROWS_RECALLED,
    ROWS_SELECTED,
    SELECTIONS,
    exchange_resident_reference,
    select_candidates_reference,
    select_runs_reference,
    select_units_reference,
)
from kvframe_kernels.select_units.reference import resident_difference_reference as resident_difference

__all__ = [
    "NUM_TALLIES",
    "ROWS_RECALLED",
    "ROWS_SELECTED",
    "SELECTIONS",
    "exchange_resident",
    "exchange_resident_reference",
    "resident_difference",
    "select_candidates",
    "select_candidates_reference",
    "select_runs",
    "select_runs_reference",
    "select_units",
    "select_units_reference",
]


def select_units(
    scores: Tensor,
    unit_offsets: Tensor,
    token_budget: int,
    *,
    due: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`select_units_reference`, by the chosen backend.

    due: bool [B, H]; where false the result may be anything. The kernels give the rows in ascending order.
    """
    reason = float_reason(scores) or _size_reason(scores.shape[-1])
    if choose("select_units", scores, backend, reason, kernels=("triton",)) == "reference":
        return select_units_reference(scores, unit_offsets, token_budget)
    from kvframe_kernels.select_units.triton_kernel import select_units_triton

    return select_units_triton(scores, unit_offsets, token_budget, due)


def select_candidates(
    scores: Tensor,
    unit_offsets: Tensor,
    token_budget: int,
    *,
    due: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_candidates_reference`, by the chosen backend.

    due: bool [B, H]; where false the result may be anything.
    """
    reason = float_reason(scores) or _size_reason(scores.shape[-1])
    if choose("select_candidates", scores, backend, reason, kernels=("triton",)) == "reference":
        return select_candidates_reference(scores, unit_offsets, token_budget)
    from kvframe_kernels.select_units.triton_kernel import select_candidates_triton

    return select_candidates_triton(scores, unit_offsets, token_budget, due)


def select_runs(
    scores: Tensor,
    rows: Tensor,
    count: Tensor,
    run_length: int,
    token_budget: int,
    *,
    due: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`select_runs_reference`, by the chosen backend.

    due: bool [B, H]; where false the result may be anything. The kernels give the rows in the order of the candidates.
    """
    reason = float_reason(scores) or _size_reason(scores.shape[-1])
    if choose("select_runs", scores, backend, reason, kernels=("triton",)) == "reference":
        return select_runs_reference(scores, rows, count, run_length, token_budget, due=due)
    from kvframe_kernels.select_units.triton_kernel import select_runs_triton

    return select_runs_triton(scores, rows, count, run_length, token_budget, due)


def _size_reason(num_units: int) -> str | None:
    return None if 0 < num_units < 1 << 20 else f"kernels serve 1 to {1 << 20} units, not {num_units}"


def exchange_resident(
    slots: Slots,
    counts: Tensor,
    rows: Tensor,
    count: Tensor,
    due: Tensor,
    tallies: Tensor,
    marks: Tensor,
    num_rows: int,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """`exchange_resident_reference`, by the chosen backend.

    marks: int32 [B, H, ceil(num_rows / 32)], zero before and after: a bit a row for the kernels to work with.

    Raises KernelError in debug mode for a row outside the pool; otherwise such a row is not selected.
    """
    if is_debug():
        outside = ((rows < -1) | (rows >= num_rows)).any(-1) & due
        if bool(outside.any()):
            batch, head = (int(index) for index in outside.nonzero()[0])
            raise KernelError(
                f"batch row {batch}, KV head {head}: a selection names a row outside the pool of {num_rows} rows; the "
                "selector, or the unit boundaries it was given, are wrong"
            )
    if choose("exchange_resident", rows, backend, None, kernels=("triton",)) == "reference":
        return exchange_resident_reference(slots, counts, rows, count, due, tallies, num_rows)
    from kvframe_kernels.select_units.triton_kernel import exchange_resident_triton

    return exchange_resident_triton(slots, counts, rows, count, due, tallies, marks, num_rows)
