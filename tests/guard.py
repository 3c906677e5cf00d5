"""Buffers between canary bands: what a kernel must fill is poisoned, and what it must not touch is checked."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_BAND = 64


class Guard:
    """Makes tensors with a band of known values on both sides, and checks the bands."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._bands: list[tuple[Tensor, Tensor]] = []

    def poisoned(self, *shape: int, dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """A tensor of NaN, or of a large negative number where there is no NaN."""
        return self.empty(*shape, dtype=dtype, pinned=pinned).fill_(_poison(dtype))

    def copy(self, source: Tensor, *, pinned: bool = False) -> Tensor:
        """A copy of a tensor, guarded."""
        return self.empty(*source.shape, dtype=source.dtype, pinned=pinned).copy_(source)

    def empty(self, *shape: int, dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """A contiguous tensor between two bands, on the device, or pinned on the host."""
        num = 1
        for size in shape:
            num *= size
        device = torch.device("cpu") if pinned else self.device
        whole = torch.empty(num + 2 * _BAND, dtype=dtype, device=device)
        if pinned and self.device.type == "cuda":
            whole = whole.pin_memory()
        canary = torch.arange(_BAND, device=whole.device).remainder(5).to(dtype)
        for band in (whole[:_BAND], whole[_BAND + num :]):
            band.copy_(canary)
            self._bands.append((band, canary))
        return whole[_BAND : _BAND + num].view(shape)

    def check(self) -> None:
        """Every band is as it was."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        for band, canary in self._bands:
            assert torch.equal(band, canary), "a kernel wrote outside its buffer"


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else -(2**31) + 7


@contextmanager
def guarded(device: torch.device) -> Iterator[Guard]:
    """A guard that is checked when the block ends."""
    guard = Guard(device)
    yield guard
    guard.check()
