"""Queues of work on a device, and how they wait for each other."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Lane(ABC):
    """Work in the order in which it was queued.

    Lanes run side by side. One waits for another at a *mark*, which stands for all that the other had queued when the
    mark was made. Only `drain` makes the host wait.
    """

    @abstractmethod
    def mark(self) -> Any:
        """The end of what has been queued so far."""

    @abstractmethod
    def wait(self, mark: Any) -> None:
        """Queue nothing further before another lane has reached a mark."""

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy between device and host: contiguous tensors of one shape and dtype, those on the host pinned.

        Neither may be freed or written again before the lane has passed the copy.
        """

    def keep(self, tensor: Tensor) -> None:  # noqa: B027, where memory is not used again at once, nothing is to do
        """Let a tensor be freed by whoever holds it, and its memory be used again only once this lane has passed what
        is queued."""

    @abstractmethod
    def drain(self) -> None:
        """Make the host wait until all is done."""


class HostLane(Lane):
    """The CPU: everything is done when it is queued."""

    def mark(self) -> Any:
        return None

    def wait(self, mark: Any) -> None:
        pass

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def drain(self) -> None:
        pass


class StreamLane(Lane):
    """A CUDA stream; with `stream=None` whichever is current when something is queued."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._stream = stream

    def _current(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._current())
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        self._current().wait_event(mark)

    def copy(self, target: Tensor, source: Tensor) -> None:
        # A tensor that is not contiguous would go through a temporary one, allocated on this stream.
        assert target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype
        with torch.cuda.stream(self._current()):
            target.copy_(source, non_blocking=True)

    def keep(self, tensor: Tensor) -> None:
        tensor.record_stream(self._current())

    def drain(self) -> None:
        self._current().synchronize()
