"""The way of a prompt's KV between device and host, beside the work that computes."""

import math
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from kvframe.memory.lanes import HostLane, Lane, StreamLane

Pieces = Sequence[tuple[Tensor, Tensor]]
"""Pairs of a part of a buffer on the device and its place on the host: contiguous, of one shape and dtype."""

_NUM_STAGING = 3


@frozen(kw_only=True, eq=False)
class Parcel:
    """What to bring from the host, and the tensor on the device that it becomes."""

    key: Hashable
    """Two parcels with one key are the same rows, with the same content."""
    shape: Sequence[int]
    dtype: torch.dtype
    pieces: Callable[[Tensor], Pieces]
    """Says of a tensor of that shape which parts come from where; the others stay uninitialised."""
    planned_bytes: int = 0
    """What later parcels will need at most; a buffer that has to grow grows ahead of them."""


class Link:
    """Copies to and from the host on lanes of their own, through a few fixed buffers on the device.

    On the way out a block of rows lies in one of three staging buffers: `stage`, fill it, `send`. On the way in it lies
    in one of two receive buffers: `fetch` ahead of time, `take`. The order of the lanes says when a buffer may be used
    again, so that no call makes the host wait but `drain` and `release`.

    compute: the lane of all other work, on which buffers are filled and read.
    outward, inward: the lanes of the copies.

    One thread may use a link.
    """

    def __init__(self, device: torch.device, compute: Lane, outward: Lane, inward: Lane) -> None:
        self._compute = compute
        self._outward = outward
        self._inward = inward
        self._staging = [_Buffer(device) for _ in range(_NUM_STAGING)]
        self._next_staged = 0
        self._last_sent: Any = None
        self._receiving = [_Buffer(device) for _ in range(2)]
        self._last_taken = 1
        self._fetched: tuple[Hashable, Tensor] | None = None

    # ---- to the host ------------------------------------------------------------------------------------------------

    def stage(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the device, uninitialised, to be filled and then sent.

        Valid until it has been sent. Three can be out at a time; a fourth takes the place of the first.
        """
        buffer = self._staging[self._next_staged]
        self._next_staged = (self._next_staged + 1) % _NUM_STAGING
        buffer.wait(self._compute)
        return buffer.view(shape, dtype, self._compute)

    def is_staged(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a staging buffer."""
        return any(buffer.holds(tensor) for buffer in self._staging)

    def send(self, staged: Tensor, pieces: Pieces) -> None:
        """Queue copies of parts of a staged tensor to the host, behind all that has been queued to fill it.

        What arrives on the host may be read by `fetch` from now on, by kernels after `finish_sends`, by the host after
        `drain`.

        Raises ValueError for a tensor that does not come from `stage`.
        """
        buffer = next((buffer for buffer in self._staging if buffer.holds(staged)), None)
        if buffer is None:
            raise ValueError("a tensor to send must come from stage(); copies of any other would race with its reuse")
        self._outward.wait(self._compute.mark())
        for on_device, on_host in pieces:
            self._outward.copy(on_host, on_device)
        buffer.mark = self._last_sent = self._outward.mark()

    def finish_sends(self) -> None:
        """Let what is queued to compute from now on find on the host all that was sent. The host does not wait."""
        if self._last_sent is not None:
            self._compute.wait(self._last_sent)

    def send_aside(self, on_device: Tensor, on_host: Tensor) -> Any:
        """Queue a copy of a tensor of any other kind behind what has been sent; returns the mark of its end.

        On the lane that computes, even a few bytes would wait until the copy engine is through with what was sent, and
        all that computes with them. The tensor may be dropped, but nobody may write to it.
        """
        self._outward.wait(self._compute.mark())
        self._outward.copy(on_host, on_device)
        self._outward.keep(on_device)
        return self._outward.mark()

    # ---- to the device ----------------------------------------------------------------------------------------------

    def fetch(self, parcel: Parcel) -> None:
        """Start to bring a parcel, for a later `take`, behind all that has been sent and all that has been queued.

        One parcel is on its way at a time: another one fetched before it is taken replaces it. It goes where the tensor
        taken before the last one lies, so all that reads that one must have been queued.
        """
        self._fetched = None
        buffer = self._receiving[1 - self._last_taken]
        tensor = buffer.view(parcel.shape, parcel.dtype, self._compute, parcel.planned_bytes)
        if self._last_sent is not None:
            self._inward.wait(self._last_sent)
        # Three things have to be over: reading what lay in this buffer, using the memory that a grown one got, and
        # kernels that write to the host.
        self._inward.wait(self._compute.mark())
        for on_device, on_host in parcel.pieces(tensor):
            self._inward.copy(on_device, on_host)
        buffer.mark = self._inward.mark()
        self._fetched = (parcel.key, tensor)

    def take(self, parcel: Parcel) -> Tensor:
        """The parcel's tensor, fetched now if it was not before. What is queued to compute from now on finds it filled.

        Valid until the parcel after the next one is fetched or taken.
        """
        if self._fetched is None or self._fetched[0] != parcel.key:
            self.fetch(parcel)
        assert self._fetched is not None
        tensor, self._fetched = self._fetched[1], None
        self._last_taken = 1 - self._last_taken
        self._receiving[self._last_taken].wait(self._compute)
        return tensor

    # ---- the whole --------------------------------------------------------------------------------------------------

    @property
    def device_bytes(self) -> int:
        """Device memory held by the buffers."""
        return sum(buffer.memory.nbytes for buffer in (*self._staging, *self._receiving))

    def drain(self) -> None:
        """Make the host wait until all that was queued here, and all else that computes, is done."""
        for lane in (self._compute, self._outward, self._inward):
            lane.drain()

    def free_buffers(self) -> None:
        """Free the buffers in the order of what is queued, without making the host wait; they come back when needed."""
        self._fetched = None
        for buffer in (*self._staging, *self._receiving):
            buffer.wait(self._compute)
            buffer.free()

    def release(self) -> None:
        """Free the buffers, once all is done; they come back when they are needed. Tensors handed out end here."""
        self.drain()
        self.free_buffers()


class _Buffer:
    """Device memory that tensors of changing shapes lie in, one at a time; it grows and does not shrink."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.free()

    def free(self) -> None:
        """Hold nothing."""
        # Buffers outlive the run that first needs them; under inference mode no later run could write into them.
        with torch.inference_mode(False):
            self.memory = torch.empty(0, dtype=torch.uint8, device=self._device)
        self.mark: Any = None  # the end of the last copy out of the buffer, or into it

    def wait(self, lane: Lane) -> None:
        """Let a lane wait for the last copy."""
        if self.mark is not None:
            lane.wait(self.mark)

    def view(self, shape: Sequence[int], dtype: torch.dtype, compute: Lane, planned_bytes: int = 0) -> Tensor:
        """A tensor at the start of the buffer, which grows if it is too small, to twice the need if so much is planned.

        compute: the lane in whose order the device's memory is allocated and freed.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        with torch.inference_mode(False):
            if num_bytes > self.memory.nbytes:
                self.wait(compute)
                self.free()  # first, so that old and new need not fit at once
                size = max(num_bytes, min(2 * num_bytes, planned_bytes))
                self.memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            return self.memory[:num_bytes].view(dtype).view(*shape)

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in this buffer."""
        return tensor.untyped_storage().data_ptr() == self.memory.untyped_storage().data_ptr()


_threads = threading.local()


def link_of(device: torch.device) -> Link:
    """The link of a device, made when it is first asked for; every thread has its own, because its buffers are filled
    and read step by step."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    links: dict[torch.device, Link] = vars(_threads).setdefault("links", {})
    if device not in links:
        links[device] = _make_link(device)
    return links[device]


def _make_link(device: torch.device) -> Link:
    if device.type != "cuda":
        lane = HostLane()
        return Link(device, compute=lane, outward=lane, inward=lane)
    outward, inward = (StreamLane(device, torch.cuda.Stream(device)) for _ in range(2))  # type: ignore[no-untyped-call]
    return Link(device, StreamLane(device), outward, inward)
