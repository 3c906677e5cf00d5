"""Page-locked memory: what is handed out is nobody else's, and what comes back is used again.

Where there is no CUDA device the pages are ordinary ones, and everything else is the same.
"""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvframe.errors import HostMemoryError
from kvframe.memory import pinned as pinned_module
from kvframe.memory.pinned import PinnedMemory, pinned_empty, pinned_memory

KIB = 1024


@pytest.fixture
def memory() -> Iterator[PinnedMemory]:
    """Memory of a test's own, empty."""
    memory = PinnedMemory()
    yield memory
    gc.collect()
    memory.release()


def num_bytes(memory: PinnedMemory, size: int) -> Tensor:
    """A tensor of so many bytes."""
    return memory.empty((size,), torch.uint8)


@pytest.mark.parametrize(
    "derive",
    [
        lambda tensor: tensor[1:],
        lambda tensor: tensor.view(-1)[::7],
        lambda tensor: tensor.transpose(0, 1)[3:4],
        lambda tensor: tensor.detach().unbind(0)[1],
        lambda tensor: tensor.view(torch.uint8),
        lambda tensor: tensor.untyped_storage(),
    ],
)
def test_views_keep_the_memory(memory: PinnedMemory, derive: Callable[[Tensor], Any]) -> None:
    """It comes back when the tensor and all that was derived from it are gone, and not before."""
    tensor = memory.empty((4, 100), torch.float32)
    derived = derive(tensor)
    used = memory.held_bytes - memory.free_bytes
    assert used >= tensor.nbytes

    del tensor
    assert memory.held_bytes - memory.free_bytes == used
    del derived
    assert memory.free_bytes == memory.held_bytes > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (), (2, 0, 3)])
def test_tensors_are_as_asked_for(memory: PinnedMemory, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Shape, dtype and place; they can be written to, and start where a kernel can read vectors."""
    tensor = memory.empty(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous() and tensor.device.type == "cpu"
    assert tensor.data_ptr() % 64 == 0 and torch.equal(tensor.fill_(1), torch.ones(shape, dtype=dtype))
    assert tensor.numel() == 0 or tensor.is_pinned() == torch.cuda.is_available()


sizes = st.one_of(st.integers(0, 300), st.integers(4000, 20_000))


@given(steps=st.lists(st.tuples(sizes, st.integers(0, 7)), max_size=40))
def test_blocks_do_not_overlap(steps: list[tuple[int, int]]) -> None:
    """Whatever is taken and dropped in whichever order: what lives keeps its content, and in the end all is free."""
    memory = PinnedMemory()
    living: dict[int, Tensor] = {}
    for step, (size, slot) in enumerate(steps):
        living.pop(slot, None)
        if size:
            living[slot] = num_bytes(memory, size).fill_(step)
            assert memory.held_bytes - memory.free_bytes >= sum(tensor.nbytes for tensor in living.values())
        for tensor in living.values():
            assert tensor.numel() == 0 or bool((tensor == tensor[0]).all())
    assert len({int(tensor[0]) for tensor in living.values()}) == len(living)
    living.clear()
    tensor = None

    assert memory.free_bytes == memory.held_bytes == memory.release()
    assert memory.held_bytes == 0


def test_a_small_request_takes_a_small_block(memory: PinnedMemory) -> None:
    """The smallest block that fits is cut, so that a large one stays whole."""
    large, small = num_bytes(memory, 64 * KIB), num_bytes(memory, 4 * KIB)
    place, held = small.data_ptr(), memory.held_bytes
    del large, small
    assert num_bytes(memory, 3 * KIB).data_ptr() == place

    first, second = num_bytes(memory, KIB), num_bytes(memory, 64 * KIB)
    assert first.data_ptr() == place and second.nbytes == 64 * KIB
    assert memory.held_bytes == held


def test_neighbours_become_one_again(memory: PinnedMemory) -> None:
    """Blocks that were cut from one and came back in any order can be had as one."""
    memory.reserve(16 * KIB)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]):
        blocks: list[Tensor | None] = [num_bytes(memory, 4 * KIB) for _ in range(4)]
        assert memory.free_bytes == 0
        for place in order:
            blocks[place] = None
        whole = num_bytes(memory, 16 * KIB)
        assert memory.held_bytes == whole.nbytes
        del whole


def test_a_run_is_reserved_at_once(memory: PinnedMemory) -> None:
    """Odd sizes included, nothing more is locked for the blocks that were reserved; nor for a second run of them."""
    size, num_blocks = 5 * KIB + 1, 9
    memory.reserve(size, num_blocks)
    held, seconds = memory.held_bytes, memory.pinning_seconds
    assert held >= size * num_blocks and seconds > 0
    for _ in range(2):
        blocks = [num_bytes(memory, size) for _ in range(num_blocks)]
        assert (memory.held_bytes, memory.pinning_seconds) == (held, seconds)
        blocks.clear()
        memory.reserve(size, num_blocks)
    assert (memory.held_bytes, memory.pinning_seconds) == (held, seconds)


def test_a_larger_run_keeps_what_it_can_use(memory: PinnedMemory) -> None:
    """What is missing is locked; what is too small for any of its blocks goes back to the system."""
    memory.reserve(8 * KIB, 4)
    memory.reserve(16 * KIB, 4)
    assert memory.held_bytes == 64 * KIB
    memory.reserve(128 * KIB)
    assert memory.held_bytes == 128 * KIB


def test_release_leaves_what_is_used(memory: PinnedMemory) -> None:
    """Memory of a tensor that lives is not taken away, even where most of what was locked with it is free."""
    memory.reserve(32 * KIB)
    tensor = num_bytes(memory, KIB).fill_(7)
    other = num_bytes(memory, 64 * KIB)
    del other

    assert memory.release() == 64 * KIB and memory.held_bytes == 32 * KIB
    assert bool((tensor == 7).all())
    del tensor
    assert memory.release() == 32 * KIB and memory.held_bytes == 0


def test_a_device_finishes_before_memory_is_used_again(memory: PinnedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where something came back, once, and just for the device that had used it."""
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    device = torch.device("cuda", 3)
    first = memory.empty((KIB,), torch.uint8, device)
    second = memory.empty((KIB,), torch.uint8, device)
    assert memory.free_bytes > KIB and waited == []
    del first, second
    num_bytes(memory, 10)
    assert waited == [device]
    num_bytes(memory, 10)
    assert waited == [device]

    third = memory.empty((KIB,), torch.uint8, device)
    del third
    memory.release()
    assert waited == [device, device]


class TestRefusal:
    def test_too_much(self, memory: PinnedMemory) -> None:
        """More than there is fails before any page is made, and says how much was asked for."""
        with pytest.raises(HostMemoryError, match=r"1048576\.00 GiB .* shorter context"):
            memory.reserve(2**50)
        with pytest.raises(HostMemoryError, match="0.00 GiB are held"):
            memory.empty((2**20, 2**30), torch.float32)
        assert memory.held_bytes == 0

    def test_what_is_free_makes_room(self, memory: PinnedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before a request fails, what nobody uses goes back to the system."""
        memory.reserve(16 * KIB)
        limit = 40 * KIB
        monkeypatch.setattr(
            pinned_module, "available_host_memory", lambda: limit - sum(segment.size for segment in memory._segments)
        )
        assert num_bytes(memory, 32 * KIB).nbytes == memory.held_bytes
        with pytest.raises(HostMemoryError):
            num_bytes(memory, 64 * KIB)

    def test_torch_helps_out(self, memory: PinnedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where pages cannot be locked, torch's own pinned memory is divided in the same way."""
        monkeypatch.setattr(pinned_module, "_lock_pages", lambda size: None)
        memory.reserve(8 * KIB)
        blocks = [num_bytes(memory, 4 * KIB).fill_(value) for value in range(2)]
        assert memory.held_bytes == 8 * KIB and [int(block.amax()) for block in blocks] == [0, 1]

        monkeypatch.setattr(pinned_module, "_lock_by_torch", lambda size: None)
        with pytest.raises(HostMemoryError):
            num_bytes(memory, KIB)
        blocks.clear()
        assert num_bytes(memory, 8 * KIB).nbytes == memory.held_bytes


def test_memory_outlives_inference_mode(memory: PinnedMemory) -> None:
    """A tensor made in inference mode can be written to by a run that does not use it."""
    with torch.inference_mode():
        tensor = memory.empty((4, 4), torch.float32)
    assert torch.equal(tensor[1].copy_(torch.ones(4)), torch.ones(4))


def test_many_threads(memory: PinnedMemory) -> None:
    """They take and drop at the same time; nobody gets what another one holds."""

    def use(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        for size in torch.randint(1, 9000, (60,), generator=generator).tolist():
            first, second = num_bytes(memory, size).fill_(seed), num_bytes(memory, 64).fill_(seed)
            if not bool((first == seed).all()) or not bool((second == seed).all()):
                return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(8)))
    assert memory.free_bytes == memory.held_bytes


def test_one_for_the_process() -> None:
    """`pinned_empty` takes from the memory that everyone shares."""
    used = pinned_memory().held_bytes - pinned_memory().free_bytes
    tensor = pinned_empty((100, 3), torch.float32)
    assert pinned_memory().held_bytes - pinned_memory().free_bytes >= used + tensor.nbytes
