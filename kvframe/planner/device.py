"""What the planner knows of a device, and how to measure it."""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from attrs import field, frozen

from kvframe.errors import ConfigError
from kvframe.validators import integer

_COPY_BYTES = 2**30
_MATMUL_SIZE = 8192
_REPEATS = 7


def _positive(instance: Any, attribute: Any, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"Device.{attribute.name} must be a number > 0, got {value!r}")


@frozen(kw_only=True)
class Device:
    """Memory and speed of a device and of its link to the host.

    The default speeds are those of one NVIDIA H200 behind PCIe 5 x16, measured with copies and a matmul: they are the
    upper end of what there is, and `measure_device` replaces them by those of the present device.

    Raises ConfigError for a number that is not positive.
    """

    gpu_memory: int = field(validator=integer(at_least=1))
    """Bytes on the device that weights, KV and everything else may take together."""
    memory_bandwidth: float = field(default=4.3e12, validator=_positive)
    """Bytes/s of device memory, read and written bytes of a copy counted together."""
    link_bandwidth: float = field(default=55e9, validator=_positive)
    """Bytes/s between pinned host memory and the device, in each direction."""
    matmul_flops: float = field(default=7e14, validator=_positive)
    """Operations/s of a large matmul, a multiplication and an addition counted as two."""


def measure_device(gpu_memory: int | None = None) -> Device:
    """The present CUDA device: a copy in its memory, a copy from pinned memory and a bfloat16 matmul, medians.

    gpu_memory: bytes to plan with; what is free now without it. The measurement itself takes 2.3 GiB.

    Raises ConfigError where there is no CUDA device, or too little free memory on it.
    """
    if not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device to measure; leave the speeds to their defaults, or run this on one")
    free = int(torch.cuda.mem_get_info()[0])
    try:
        speeds = _measure()
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"measuring the device takes 2.3 GiB of its memory, {free / 2**30:.1f} GiB are free; end what fills it"
        ) from error
    torch.cuda.empty_cache()  # who plans is about to load a model
    return Device(gpu_memory=free if gpu_memory is None else gpu_memory, **speeds)


def _measure() -> dict[str, float]:
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    pinned = torch.zeros(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    # Not constant: numbers that are all alike take less power, and a GPU multiplies them faster.
    left = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, dtype=torch.bfloat16, device="cuda")
    product = torch.empty_like(left)
    return {
        "memory_bandwidth": 2 * _COPY_BYTES / _seconds(lambda: target.copy_(source)),
        "link_bandwidth": _COPY_BYTES / _seconds(lambda: target.copy_(pinned, non_blocking=True)),
        "matmul_flops": 2 * _MATMUL_SIZE**3 / _seconds(lambda: torch.mm(left, left, out=product)),
    }


def _seconds(work: Callable[[], Any]) -> float:
    """Median time of some work on the device, the first call left out."""
    work()
    times: list[float] = []
    for _ in range(_REPEATS):
        start, stop = _event(), _event()
        start.record()
        work()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return median(times)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
