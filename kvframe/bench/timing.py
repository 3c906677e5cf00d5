"""Clocks: steps of a loop, single operations inside a CUDA graph, and bandwidths."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from attrs import frozen

_MIB = 2**20


@frozen(kw_only=True)
class StepTimes:
    """A loop of equal steps."""

    num_steps: int
    mean_ms: float
    """The whole loop over its steps."""
    median_ms: float
    """Of single steps."""


def time_steps(step: Callable[[], object], num_steps: int, device: torch.device) -> StepTimes:
    """Run `step` that often. On a CUDA device events on the stream tell the time, and the host waits only at the end:
    a step that the host prepares more slowly than the device runs it shows its full time all the same."""
    if device.type != "cuda":
        marks = [perf_counter()]
        for _ in range(num_steps):
            step()
            marks.append(perf_counter())
        each = [1e3 * (stop - start) for start, stop in pairwise(marks)]
        return StepTimes(num_steps=num_steps, mean_ms=sum(each) / num_steps, median_ms=median(each))
    events = [_event() for _ in range(num_steps + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    events[-1].synchronize()
    each = [start.elapsed_time(stop) for start, stop in pairwise(events)]
    mean = events[0].elapsed_time(events[-1]) / num_steps
    return StepTimes(num_steps=num_steps, mean_ms=mean, median_ms=median(each))


def time_calls(calls: Sequence[Callable[[], object]], *, repeats: int, warmup: int = 1) -> float:
    """Microseconds of a call launched from Python, the calls taken in turn; CUDA only."""
    for number in range(warmup * len(calls)):
        calls[number % len(calls)]()
    turns = iter(range(repeats * len(calls)))
    device = torch.device("cuda", torch.cuda.current_device())
    return 1e3 * time_steps(lambda: calls[next(turns) % len(calls)](), repeats * len(calls), device).mean_ms


def time_in_graph(calls: Sequence[Callable[[], object]], *, repeats: int, replays: int, settle: int = 2) -> float:
    """Microseconds of a call as a node of a CUDA graph that holds all calls `repeats` times in turn; CUDA only.

    Calls on several inputs that together are larger than the cache show what a call costs whose inputs are not in it.
    settle: replays before the clock starts.
    """
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever compiles or allocates for good does it here, not while capturing
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    for _ in range(settle):
        graph.replay()
    start, stop = _event(), _event()
    start.record()
    for _ in range(replays):
        graph.replay()
    stop.record()
    stop.synchronize()
    milliseconds: float = start.elapsed_time(stop)
    return 1e3 * milliseconds / (replays * repeats * len(calls))


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copy_bandwidth(device: torch.device, num_bytes: int = 1024 * _MIB) -> float:
    """Bytes a second that a copy within device memory reads and writes together."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes * 1e6 / time_calls([lambda: target.copy_(source)], repeats=20, warmup=3)


def link_bandwidth(device: torch.device, num_bytes: int = 256 * _MIB) -> float:
    """Bytes a second that the copy engine brings from pinned host memory to the device."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    return num_bytes * 1e6 / time_calls([lambda: target.copy_(source, non_blocking=True)], repeats=10, warmup=2)
