"""`kvframe bench kernels`: every operation of a step alone, beside what its bytes take at least."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve

from kvframe.bench import Outcome
from kvframe.bench.case import REPEATS, Case, KernelSizes
from kvframe.bench.environment import describe
from kvframe.bench.kernel_cases import make_cases
from kvframe.bench.timing import copy_bandwidth, link_bandwidth, time_calls, time_in_graph
from kvframe_kernels.dispatch import FallbackWarning


def quick(sizes: KernelSizes) -> KernelSizes:
    """The same as a smoke run."""
    return evolve(sizes, context=8192, prompts=(8192,), attention_batches=(1,), spread=2**24)


def run_kernels(
    sizes: KernelSizes, *, replays: int = 20, progress: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Measure all operations; CUDA only.

    What belongs to a decode step is a node of a CUDA graph, on several inputs in turn; what belongs to the prompt is
    launched from Python. An operation whose kernel cannot run has an error instead of a figure.
    """
    progress("bandwidths")
    bandwidths = {"device": copy_bandwidth(sizes.device), "link": link_bandwidth(sizes.device)}
    rows: list[dict[str, Any]] = []
    for make in make_cases(sizes):
        for case in make():
            progress(f"{case.op}, {case.state}")
            floor = 1e6 * case.num_bytes / bandwidths[case.over] if case.num_bytes else None
            rows.append(_row(case, floor, replays))
            del case
        gc.collect()
        torch.cuda.empty_cache()
    return Outcome(
        benchmark="kernels",
        environment=describe(sizes.device),
        conditions={
            "dtype": str(sizes.dtype).removeprefix("torch."),
            "num_qo_heads": sizes.num_qo_heads,
            "num_kv_heads": sizes.num_kv_heads,
            "head_dim": sizes.head_dim,
            "context": sizes.context,
            "num_units": sizes.num_units,
            "token_budget": sizes.token_budget,
            "window_size": sizes.window_size,
            "miss": sizes.miss,
            "oversample": sizes.oversample,
            "sketch_bits": sizes.sketch_bits,
            "copy_bytes_per_s": bandwidths["device"],
            "link_bytes_per_s": bandwidths["link"],
        },
        rows=rows,
        ratios=added_by_entries(rows),
        notes=[
            "floor: bytes over the bandwidth of a copy within the device, or over the link for store_token and "
            "gather_kv; k-means is bound by arithmetic, and its floor counts reading the keys once an iteration",
            "a ratio is what entries add to the time of the same slots alone, over what they add to its floor",
        ],
    )


def added_by_entries(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What virtual entries add to attention over the same slots, over what their bytes take at least."""
    attention = {row["state"]: row for row in rows if row["op"] == "slot_attention" and row["microseconds"] is not None}
    ratios = {}
    for state, row in attention.items():
        alone = attention.get(state.rpartition(", ")[0])
        if alone is not None:
            added, floor = (row[name] - alone[name] for name in ("microseconds", "floor_microseconds"))
            ratios[f"{state}: added by entries / their floor"] = added / floor
    return ratios


def _row(case: Case, floor: float | None, replays: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "op": case.op,
        "state": case.state,
        "microseconds": None,
        "floor_microseconds": floor,
        "ratio": None,
        "bytes": case.num_bytes or None,
        "in_graph": case.in_graph,
        "error": None,
    }
    try:
        with warnings.catch_warnings():
            # Plain torch in place of a kernel is no figure of the kernel, and may not be captured.
            warnings.simplefilter("error", FallbackWarning)
            row["microseconds"] = _time(case, replays)
    except (FallbackWarning, RuntimeError) as error:  # a KernelError, or what a compiler or a capture says
        row["error"] = str(error).partition("\n")[0]
    if row["microseconds"] is not None and floor:
        row["ratio"] = row["microseconds"] / floor
    return row


def _time(case: Case, replays: int) -> float:
    if case.in_graph:
        return time_in_graph(case.calls, repeats=REPEATS, replays=replays, settle=case.settle)
    return time_calls(case.calls, repeats=3)
