"""Page-locked host memory, which devices copy to and from at full speed and kernels reach: locked once, used again."""

import contextlib
import ctypes
import mmap
import threading
import time
import weakref
from bisect import insort
from collections import deque
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

from kvframe.errors import HostMemoryError
from kvframe.memory.available import available_host_memory

# Blocks start at multiples of it: a cache line, and more than any kernel's vector.
_ALIGNMENT = 64
# cudaHostRegisterPortable | cudaHostRegisterMapped: for every device, and for kernels.
_FLAGS = 1 | 2


class PinnedMemory:
    """Hands out page-locked host memory and takes it back when nobody refers to it any more.

    Locking pages takes half a second a GiB, so memory that comes back is kept for the next who asks. Where there is no
    CUDA device it hands out ordinary memory in just the same way. Any thread may use it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: list[_Segment] = []
        # A tensor may die anywhere, in a thread that holds the lock too, so what comes back waits here.
        self._returned: deque[tuple[_Segment, _Span, torch.device | None]] = deque()
        self._unsettled: set[torch.device] = set()
        self._pinning_seconds = 0.0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """A contiguous CPU tensor, uninitialised.

        device: the one that uses it. The tensor may be dropped while that still does.

        Raises HostMemoryError where the system does not give that much.
        """
        num_bytes = prod(shape) * dtype.itemsize
        # A tensor made in inference mode could not be written to outside.
        with torch.inference_mode(False):
            if num_bytes == 0:
                return torch.empty(tuple(shape), dtype=dtype)
            with self._lock:
                segment, span = self._take(_aligned(num_bytes))
            # All views of a tensor share its storage, and the storage keeps the object whose memory it is.
            owner = (ctypes.c_uint8 * num_bytes).from_address(segment.memory.data_ptr() + span.start)
            finalizer = weakref.finalize(owner, self._returned.append, (segment, span, device))
            finalizer.atexit = False
            return torch.frombuffer(owner, dtype=dtype).view(tuple(shape))

    def reserve(self, num_bytes: int, num_blocks: int = 1) -> None:
        """Lock what is missing for `num_blocks` tensors of `num_bytes` each, all at once.

        Raises HostMemoryError where the system does not give that much.
        """
        size = _aligned(num_bytes)
        with self._lock:
            self._settle()
            missing = num_blocks - sum(segment.num_fitting(size) for segment in self._segments)
            if size > 0 and missing > 0:
                # What cannot serve would only be in the way: a run's memory is large.
                self._release([segment for segment in self._segments if segment.size < size])
                self._add_segment(missing * size)

    @property
    def held_bytes(self) -> int:
        """Bytes locked, in use or free."""
        with self._lock:
            return sum(segment.size for segment in self._segments)

    @property
    def free_bytes(self) -> int:
        """Bytes locked that nobody uses."""
        with self._lock:
            self._settle()
            return sum(segment.free_bytes for segment in self._segments)

    @property
    def pinning_seconds(self) -> float:
        """Time spent on locking so far."""
        return self._pinning_seconds

    def release(self) -> int:
        """Give what is free back to the system; says how many bytes. A segment that is used in part stays."""
        with self._lock:
            self._settle()
            return self._release(self._segments)

    def _take(self, size: int) -> "tuple[_Segment, _Span]":
        self._settle()
        fitting = [(span.size, i) for i, segment in enumerate(self._segments) for span in segment.fitting(size)]
        segment = self._segments[min(fitting)[1]] if fitting else self._add_segment(size)
        self._wait()
        return segment, segment.take(size)

    def _settle(self) -> None:
        """Make free what has come back."""
        while self._returned:
            segment, span, device = self._returned.popleft()
            segment.give_back(span)
            if device is not None and device.type == "cuda":
                self._unsettled.add(device)

    def _wait(self) -> None:
        """Wait until no device uses what has come back, in whichever of its streams."""
        while self._unsettled:
            torch.cuda.synchronize(self._unsettled.pop())

    def _add_segment(self, size: int) -> "_Segment":
        start = time.perf_counter()
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        # Taken page by page, memory that is not there would end the process instead of failing.
        if not _is_available(size) and not (self._release(self._segments) and _is_available(size)):
            raise self._refused(size)
        segment = _lock_pages(size) or _lock_by_torch(size)
        if segment is None:
            raise self._refused(size)
        self._segments.append(segment)
        self._pinning_seconds += time.perf_counter() - start
        return segment

    def _refused(self, size: int) -> HostMemoryError:
        held = sum(segment.size for segment in self._segments)
        return HostMemoryError(
            f"{size / 2**30:.2f} GiB of page-locked host memory were asked for, and the system does not give them; "
            f"{held / 2**30:.2f} GiB are held already; use a shorter context (max_new_tokens counts), a smaller batch, "
            "or more dense layers"
        )

    def _release(self, candidates: "list[_Segment]") -> int:
        self._wait()
        free = [segment for segment in candidates if segment.free_bytes == segment.size]
        self._segments = [segment for segment in self._segments if segment not in free]
        return sum(segment.size for segment in free)


@frozen(order=True)
class _Span:
    """Bytes [start, stop) of a segment."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@define(eq=False)
class _Segment:
    """Memory that was locked at once, and what of it is free."""

    memory: Tensor
    """uint8 [size]."""
    size: int
    _free: list[_Span] = field(init=False)
    """In order; neighbours that touch are one."""

    def __attrs_post_init__(self) -> None:
        self._free = [_Span(0, self.size)]

    @property
    def free_bytes(self) -> int:
        return sum(span.size for span in self._free)

    def fitting(self, size: int) -> list[_Span]:
        """Free spans that are large enough."""
        return [span for span in self._free if span.size >= size]

    def num_fitting(self, size: int) -> int:
        """How many blocks of a size there is room for."""
        return sum(span.size // size for span in self._free)

    def take(self, size: int) -> _Span:
        """Cut a block out of the smallest free span that is large enough."""
        span = min(self.fitting(size), key=lambda span: span.size)
        place = self._free.index(span)
        rest = _Span(span.start + size, span.stop)
        self._free[place : place + 1] = [rest] if rest.size else []
        return _Span(span.start, rest.start)

    def give_back(self, span: _Span) -> None:
        """Take a block back."""
        insort(self._free, span)
        joined: list[_Span] = []
        for free in self._free:
            if joined and joined[-1].stop == free.start:
                joined[-1] = _Span(joined[-1].start, free.stop)
            else:
                joined.append(free)
        self._free = joined


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _is_available(size: int) -> bool:
    available = available_host_memory()
    return available is None or size <= available


def _lock_pages(size: int) -> _Segment | None:
    """Take pages from the system and lock just these; None where that fails."""
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (AttributeError, OSError):
        return None
    # There are fewer large pages to make and to lock. Not every system has them.
    with contextlib.suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    segment = _Segment(memory, size)
    if torch.cuda.is_available():
        # A page is made when it is first touched: here on many cores, by the lock on one.
        memory[:: mmap.PAGESIZE].fill_(0)
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = memory.data_ptr()
        if int(cudart.cudaHostRegister(address, size, _FLAGS)) != 0:
            _forget_cuda_error()
            return None
        # Tensors keep their segment, so that it is unlocked after the last of them.
        weakref.finalize(segment, cudart.cudaHostUnregister, address).atexit = False
    return segment


def _lock_by_torch(size: int) -> _Segment | None:
    """The same from torch, which may take twice as much: it rounds up to a power of two."""
    try:
        return _Segment(torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available()), size)
    except (RuntimeError, MemoryError):
        return None


def _forget_cuda_error() -> None:
    """CUDA tells of a failed call once more after the next kernel launch, whose fault it is not; let it do so here."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


_PINNED_MEMORY = PinnedMemory()


def pinned_memory() -> PinnedMemory:
    """The page-locked memory of this process."""
    return _PINNED_MEMORY


def pinned_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """`PinnedMemory.empty` of this process's memory."""
    return _PINNED_MEMORY.empty(shape, dtype, device)
