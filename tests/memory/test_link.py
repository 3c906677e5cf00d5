"""The link: whatever order the lanes run in, everybody finds what the program says he finds."""

import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvframe.memory.lanes import HostLane, Lane
from kvframe.memory.link import Link, Parcel, link_of

CPU = torch.device("cpu")
NUM_HEADS, MOST_ROWS, WIDTH = 2, 6, 3


class Mark:
    reached = False

    def reach(self) -> None:
        self.reached = True


class Simulation:
    """Lanes that run when they are told to, in an order that is drawn: any that their marks allow."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lanes = [SimulatedLane(self) for _ in range(3)]
        # Some lanes lag behind.
        self.speeds = [self.random.choice([1, 1, 20]) for _ in self.lanes]

    def run(self) -> None:
        """Until nothing is left to do."""
        while any(lane.work for lane in self.lanes):
            ready = [i for i, lane in enumerate(self.lanes) if lane.is_ready()]
            assert ready, "the lanes wait for each other"
            self.lanes[self.random.choices(ready, [self.speeds[i] for i in ready])[0]].step()


class SimulatedLane(Lane):
    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.work: deque[Mark | Callable[[], Any]] = deque()

    def is_ready(self) -> bool:
        return bool(self.work) and (not isinstance(self.work[0], Mark) or self.work[0].reached)

    def step(self) -> None:
        work = self.work.popleft()
        if not isinstance(work, Mark):
            work()

    def queue(self, work: Callable[[], Any]) -> None:
        self.work.append(work)

    def mark(self) -> Mark:
        mark = Mark()
        self.queue(mark.reach)
        return mark

    def wait(self, mark: Mark) -> None:
        self.work.append(mark)

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype
        self.queue(lambda: target.copy_(source))

    def drain(self) -> None:
        self.simulation.run()


class InOrder(HostLane):
    """Everything at once: what the program says."""

    def queue(self, work: Callable[[], Any]) -> None:
        work()


Step = tuple[str, int, int]
steps = st.lists(
    st.tuples(
        st.sampled_from(["send", "send", "fetch", "take", "take", "kernel", "drain"]),
        st.integers(0, 2),
        st.integers(1, MOST_ROWS),
    ),
    min_size=1,
    max_size=25,
)


class Program:
    """Runs steps over a link, and keeps what the lane that computes has seen, and the host after a drain."""

    def __init__(self, link: Link, compute: Any) -> None:
        self.link, self.compute = link, compute
        self.host = torch.zeros(3, NUM_HEADS, MOST_ROWS, WIDTH)
        self.versions = [0, 0, 0]
        self.seen: list[Tensor] = []
        self.value = 0.0
        self.before: Tensor | None = None

    def run(self, program: list[Step]) -> list[Tensor]:
        for name, place, num_rows in program:
            self.value += 1
            getattr(self, name)(place, num_rows)
        self.drain(0, 1)
        return self.seen

    def see(self, tensor: Tensor) -> None:
        self.compute.queue(lambda: self.seen.append(tensor.clone()))

    def send(self, place: int, num_rows: int) -> None:
        staged = self.link.stage((NUM_HEADS, num_rows, WIDTH), torch.float32)
        value = self.value
        self.compute.queue(lambda: staged.fill_(value))
        self.link.send(staged, list(zip(staged, self.host[place, :, :num_rows], strict=True)))
        self.versions[place] += 1

    def parcel(self, place: int, num_rows: int) -> Parcel:
        """Rows of one place, and room for one more."""
        return Parcel(
            key=(place, self.versions[place], num_rows),
            shape=(NUM_HEADS, num_rows + 1, WIDTH),
            dtype=torch.float32,
            pieces=lambda rows: list(zip(rows[:, :num_rows], self.host[place, :, :num_rows], strict=True)),
        )

    def fetch(self, place: int, num_rows: int) -> None:
        self.link.fetch(self.parcel(place, num_rows))

    def take(self, place: int, num_rows: int) -> None:
        rows, value = self.link.take(self.parcel(place, num_rows)), self.value
        assert rows.shape == (NUM_HEADS, num_rows + 1, WIDTH)
        self.compute.queue(lambda: rows[:, num_rows:].fill_(value))
        self.see(rows)
        if self.before is not None:
            self.see(self.before)  # still valid
        self.before = rows

    def kernel(self, place: int, num_rows: int) -> None:
        """A kernel that reads and writes the host's memory."""
        self.link.finish_sends()
        self.see(self.host)
        value, rows = self.value, self.host[place, :, num_rows - 1]
        self.compute.queue(lambda: rows.fill_(-value))
        self.versions[place] += 1

    def drain(self, place: int, num_rows: int) -> None:
        self.link.drain()
        self.seen.append(self.host.clone())


@settings(max_examples=300)
@given(program=steps, seed=st.integers(0, 2**16))
def test_the_order_of_lanes_does_not_show(program: list[Step], seed: int) -> None:
    """Buffers that are used again, copies on their way and kernels on the host's memory never meet."""
    lanes = Simulation(seed).lanes
    seen = Program(Link(CPU, *lanes), lanes[0]).run(program)

    lane = InOrder()
    expected = Program(Link(CPU, lane, lane, lane), lane).run(program)
    assert len(seen) == len(expected) and all(map(torch.equal, seen, expected))


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_of_many_layers(seed: int) -> None:
    """Every layer is sent, and read back ahead of its turn; there is never more than a few layers' KV on the device."""
    lanes = Simulation(seed).lanes
    link, num_layers, shape = Link(CPU, *lanes), 12, (NUM_HEADS, 50, WIDTH)
    host, seen = torch.zeros(num_layers, *shape), []
    for layer in range(num_layers):
        staged = link.stage(shape, torch.float32)
        lanes[0].queue(lambda staged=staged, layer=layer: staged.fill_(layer))
        link.send(staged, list(zip(staged, host[layer], strict=True)))

    def parcel(layer: int) -> Parcel:
        return Parcel(
            key=layer, shape=shape, dtype=torch.float32, pieces=lambda rows: list(zip(rows, host[layer], strict=True))
        )

    for layer in range(num_layers):
        rows = link.take(parcel(layer))
        if layer + 1 < num_layers:
            link.fetch(parcel(layer + 1))
        lanes[0].queue(lambda rows=rows: seen.append(rows.mean().item()))
    assert link.device_bytes == 5 * host[0].nbytes
    link.drain()

    assert seen == list(range(num_layers))
    assert torch.equal(host, torch.arange(12.0)[:, None, None, None].expand_as(host))
    link.release()
    assert link.device_bytes == 0


class TestBuffers:
    def test_they_grow_ahead_of_what_is_planned(self) -> None:
        """To twice the need, but to no more than the plan or the need."""
        link, taken = Link(CPU, HostLane(), HostLane(), HostLane()), []
        for size in (10, 11, 12, 21, 30, 45, 50):
            parcel = Parcel(key=size, shape=(size,), dtype=torch.uint8, pieces=lambda rows: [], planned_bytes=40)
            link.take(parcel)
            taken.append(link.device_bytes)
        assert taken == [20, 42, 42, 42, 62, 85, 95]

    def test_only_what_was_staged_is_sent(self) -> None:
        """Another tensor might be freed before it has been read."""
        link = Link(CPU, HostLane(), HostLane(), HostLane())
        staged = link.stage((4,), torch.float32)
        assert link.is_staged(staged) and link.is_staged(staged[1:2])
        other = torch.zeros(4)
        assert not link.is_staged(other)
        with pytest.raises(ValueError, match="stage"):
            link.send(other, [])

    def test_they_outlive_inference_mode(self) -> None:
        """A run without inference mode writes into buffers of one with it."""
        link = Link(CPU, HostLane(), HostLane(), HostLane())
        with torch.inference_mode():
            link.stage((4,), torch.float32)
            staged = link.stage((4,), torch.float32)
        staged.fill_(1)
        for _ in range(2):
            link.stage((4,), torch.float32).fill_(1)

    def test_a_failed_fetch_is_not_taken(self) -> None:
        """A parcel that was broken by a later one is fetched again."""
        link = Link(CPU, HostLane(), HostLane(), HostLane())

        def fail(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
            raise RuntimeError("broken")

        source = torch.arange(2.0)
        parcel = Parcel(key=1, shape=(2,), dtype=torch.float32, pieces=lambda rows: [(rows, source)])
        link.fetch(parcel)
        with pytest.raises(RuntimeError, match="broken"):
            link.fetch(Parcel(key=2, shape=(2,), dtype=torch.float32, pieces=lambda rows: fail(rows.fill_(-1))))
        assert torch.equal(link.take(parcel), source)


def test_one_link_a_device() -> None:
    """Whoever asks gets the same one."""
    assert link_of(CPU) is link_of(torch.device("cpu"))


def test_every_thread_has_a_link_of_its_own():
    """Two threads that store and read at the same time find what they stored; one thread has one link a device."""

    def work(number: int) -> tuple[Link, bool]:
        link = link_of(CPU)
        store = torch.empty(20, 2, 5, WIDTH)
        same = link_of(CPU) is link
        for turn in range(20):
            rows = link.stage((2, 5, WIDTH), torch.float32)
            meet.wait()
            rows.fill_(100 * number + turn)
            meet.wait()
            link.send(rows, [(rows, store[turn])])
        link.drain()
        expected = 100 * number + torch.arange(20.0)[:, None, None, None].expand_as(store)
        return link, same and torch.equal(store, expected)

    meet = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as threads:
        (one, is_right), (other, is_right_too) = threads.map(work, range(2))

    assert is_right and is_right_too and one is not other
