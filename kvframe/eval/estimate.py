"""What a study will take, before it is run: the planner's memory and time for every cell."""

import functools
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from attrs import frozen

from kvframe.errors import KvframeError
from kvframe.eval.study import Cell, Study
from kvframe.memory.available import available_host_memory
from kvframe.planner import Device, ModelShape, measure_device, plan

_MATMUL_SIZE = 1024
_COPY_BYTES = 1 << 26
_REPEATS = 5
DECODED = 128
"""Tokens that are planned for behind the context, where a task does not say."""


@frozen(kw_only=True)
class Estimate:
    """The planner's answer for one cell."""

    device_bytes: int
    """Memory where the model runs: weights, slots, index and what a prompt takes."""
    host_bytes: int
    """Pools and positions in host memory."""
    seconds: float
    """Two readings of the context, for the policy and for full attention, and the decode steps; predicted."""
    fits: bool


def estimate(cell: Cell, shape: ModelShape, device: Device) -> Estimate:
    """Memory and time of one cell. Raises ConfigError where the policy does not fit the model."""
    steps = cell.watch if cell.kind == "watch" else DECODED
    found = plan(shape, cell.policy, device, context=cell.context, max_new_tokens=steps)
    return Estimate(
        device_bytes=found.memory.gpu_bytes,
        host_bytes=found.memory.host_bytes,
        seconds=2 * found.speed.time_to_first_token + steps * found.speed.step,
        fits=found.fits,
    )


def estimates(study: Study, cells: tuple[Cell, ...]) -> dict[str, Estimate | str]:
    """For every cell, by key, its estimate or why there is none.

    Raises ConfigError where the model's config cannot be read.
    """
    shape, device = _shape(study), present_device()
    found: dict[str, Estimate | str] = {}
    for cell in cells:
        try:
            found[cell.key] = estimate(cell, shape, device)
        except KvframeError as error:
            found[cell.key] = str(error)
    return found


def check_context(study: Study) -> None:
    """Raise ConfigError for a context that is longer than what the model reads, before anything runs."""
    from kvframe.eval.forced import check_length

    for context in study.context:
        check_length(_config(study.model), context, "Study.context")


@functools.lru_cache(maxsize=1)
def present_device() -> Device:
    """The CUDA device that there is, measured; without one this processor, whose memory is device and host at once."""
    if torch.cuda.is_available():
        return measure_device()
    left = torch.randn(_MATMUL_SIZE, _MATMUL_SIZE)
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = 2 * _COPY_BYTES / _seconds(lambda: target.copy_(source))
    return Device(
        gpu_memory=available_host_memory() or 1 << 34,
        memory_bandwidth=copied,
        link_bandwidth=copied,
        matmul_flops=2 * _MATMUL_SIZE**3 / _seconds(lambda: torch.mm(left, left)),
    )


def _seconds(work: Callable[[], Any]) -> float:
    """Median time of some work, the first call left out."""
    work()
    times = []
    for _ in range(_REPEATS):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return statistics.median(times)


def _config(model: str) -> Any:
    from kvframe.cli.models import read_config

    return read_config(model)


def _shape(study: Study) -> ModelShape:
    from kvframe.hf.shape import model_shape

    config = _config(study.model)
    wanted = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
    if study.dtype != "auto":
        wanted = getattr(torch, study.dtype)
    return model_shape(config, wanted)
