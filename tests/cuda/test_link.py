"""The link on a CUDA device: copies beside the work that computes, and kernels on the memory that was locked."""

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kvframe import HostPool, LayerLayout
from kvframe.memory import pinned as pinned_module
from kvframe.memory.link import Link, Parcel, link_of
from kvframe.memory.pinned import PinnedMemory, pinned_empty, pinned_memory
from kvframe_kernels.gather_kv import gather_kv, store_token

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]

NUM_HEADS, NUM_ROWS, WIDTH = 4, 32_768, 256
NUM_LAYERS = 8


@pytest.fixture
def link() -> Iterator[Link]:
    """The device's link, empty before and after."""
    link = link_of(torch.device("cuda"))
    link.release()
    yield link
    link.release()


@contextmanager
def no_sync() -> Iterator[None]:
    """Whatever makes the host wait for the device is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def keep_busy() -> None:
    """Work of some milliseconds on the stream that computes, so that whoever does not wait comes too early."""
    torch.cuda._sleep(10_000_000)


def host_rows(num_rows: int = NUM_ROWS) -> Tensor:
    """Rows of a layer on the host, 64 MiB, all -1."""
    return pinned_empty((NUM_HEADS, num_rows, WIDTH), torch.bfloat16, torch.device("cuda")).fill_(-1)


def pairs(on_device: Tensor, on_host: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A pair for every head."""
    return list(zip(on_device, on_host, strict=True))


def parcel(layer: int, host: Tensor, room: int = 0) -> Parcel:
    """A layer's rows and room for more."""
    num_rows = host.shape[1]
    return Parcel(
        key=layer,
        shape=(NUM_HEADS, num_rows + room, WIDTH),
        dtype=host.dtype,
        pieces=lambda rows: pairs(rows[:, :num_rows], host),
    )


def test_layers_go_and_come_back(link: Link) -> None:
    """Buffers are used again while the device is busy; every layer arrives, there and back, and no host waits."""
    hosts = [host_rows() for _ in range(NUM_LAYERS)]
    link.send(link.stage(hosts[0].shape, torch.bfloat16), [])  # the first use of a stream may wait
    torch.cuda.synchronize()
    with no_sync():
        for layer, host in enumerate(hosts):
            staged = link.stage(host.shape, torch.bfloat16)
            keep_busy()
            staged.fill_(layer)
            link.send(staged, pairs(staged, host))
        sums = []
        for layer, host in enumerate(hosts):
            rows = link.take(parcel(layer, host, room=5))
            if layer + 1 < NUM_LAYERS:
                link.fetch(parcel(layer + 1, hosts[layer + 1], room=5))
            keep_busy()
            rows[:, -5:].fill_(layer)
            sums.append((rows == layer).all())
    link.drain()

    assert all(bool((host == layer).all()) for layer, host in enumerate(hosts))
    assert all(bool(came) for came in sums)
    assert link.device_bytes == 5 * hosts[0].nbytes + 2 * NUM_HEADS * 5 * WIDTH * 2


def test_a_buffer_grows_while_it_is_on_its_way(link: Link) -> None:
    """Memory that a smaller buffer gives back is not written to before its copy is done."""
    hosts = [host_rows(8192 * (1 + layer)) for layer in range(6)]
    for layer, host in enumerate(hosts):
        staged = link.stage(host.shape, torch.bfloat16)
        staged.fill_(layer)
        link.send(staged, pairs(staged, host))
        # What the allocator hands out next may be the memory that has just been given back.
        torch.full(host.shape, 99.0, dtype=torch.bfloat16, device="cuda")
    came = []
    for layer, host in enumerate(hosts):
        rows = link.take(parcel(layer, host))
        if layer + 1 < len(hosts):
            link.fetch(parcel(layer + 1, hosts[layer + 1]))
        torch.full(host.shape, 99.0, dtype=torch.bfloat16, device="cuda")
        came.append((rows == layer).all())
    link.drain()

    assert all(bool((host == layer).all()) for layer, host in enumerate(hosts))
    assert all(bool(flag) for flag in came)


def test_kernels_find_what_was_sent(link: Link) -> None:
    """`finish_sends` is enough for a kernel that reads the host's memory; what a kernel writes there is fetched."""
    host = host_rows()
    slots = torch.zeros(1, NUM_HEADS, NUM_ROWS, WIDTH, dtype=torch.bfloat16, device="cuda")
    incoming = torch.arange(NUM_ROWS, device="cuda").expand(1, NUM_HEADS, -1).contiguous()
    row = torch.full((1, NUM_HEADS), 7, device="cuda")
    token = torch.full((1, NUM_HEADS, WIDTH // 2), 3.0, dtype=torch.bfloat16, device="cuda")
    k_slots, v_slots = (part.contiguous() for part in slots.chunk(2, -1))
    gather_kv(host[None], incoming[..., :1].contiguous(), 0, k_slots[:, :, :1].clone(), v_slots[:, :, :1].clone())
    store_token(host[None], torch.full_like(row, -1), 0, token, token)  # compiled
    torch.cuda.synchronize()
    with no_sync():
        staged = link.stage(host.shape, torch.bfloat16)
        keep_busy()
        staged.fill_(2)
        link.send(staged, pairs(staged, host))
        link.finish_sends()
        gather_kv(host[None], incoming, 0, k_slots, v_slots)
        keep_busy()
        store_token(host[None], row, 0, token, token)
        rows = link.take(parcel(0, host))
    torch.cuda.synchronize()

    assert bool((k_slots == 2).all()) and bool((v_slots == 2).all())
    assert bool((rows[:, 7] == 3).all()) and bool((rows[:, 8:] == 2).all())


class TestPinned:
    @pytest.fixture
    def memory(self) -> Iterator[PinnedMemory]:
        memory = PinnedMemory()
        yield memory
        gc.collect()
        memory.release()

    def test_it_is_locked_once(self, memory: PinnedMemory) -> None:
        """Tensors and their parts are pinned, wherever they lie, and a second run locks nothing."""
        memory.reserve(2**20 + 100, 5)
        held, seconds = memory.held_bytes, memory.pinning_seconds
        for _ in range(3):
            tensors = [memory.empty((2**20 + 100,), torch.uint8, torch.device("cuda", 0)) for _ in range(5)]
            assert all(tensor.is_pinned() and tensor[77:].is_pinned() for tensor in tensors)
            device = torch.full((2**20 + 100,), 5, dtype=torch.uint8, device="cuda")
            with no_sync():
                for tensor in tensors:
                    tensor.copy_(device, non_blocking=True)
            torch.cuda.synchronize()
            assert all(bool((tensor == 5).all()) for tensor in tensors)
            del tensor
            tensors.clear()
        assert (memory.held_bytes, memory.pinning_seconds) == (held, seconds)
        assert memory.release() == held and memory.held_bytes == 0

    def test_memory_comes_back_while_a_copy_uses_it(self, memory: PinnedMemory) -> None:
        """The next one who gets it is not overwritten by the last one's copy."""
        source = torch.full((2**26,), 1, dtype=torch.uint8, device="cuda")
        tensor = memory.empty((2**26,), torch.uint8, source.device)
        place = tensor.data_ptr()
        keep_busy()
        tensor.copy_(source, non_blocking=True)
        del tensor
        again = memory.empty((2**26,), torch.uint8, source.device).fill_(2)
        torch.cuda.synchronize()
        assert again.data_ptr() == place and bool((again == 2).all())

    def test_a_refused_lock(self, memory: PinnedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
        """Torch's pinned memory serves instead, and no later kernel is told of the refusal."""
        monkeypatch.setattr(pinned_module, "_FLAGS", 2**20)  # no such flag
        tensor = memory.empty((4096,), torch.uint8)
        assert tensor.is_pinned()
        assert int(torch.ones(5, device="cuda").sum()) == 5


def test_a_host_pool(link: Link) -> None:
    """Written, appended, copied, recalled and read with the device busy; its memory is pinned, and is used again."""
    layout = LayerLayout(
        layer_idx=0, num_layers=1, batch_size=2, num_qo_heads=8, num_kv_heads=NUM_HEADS, head_dim=128, value_dim=128,
        dtype=torch.bfloat16, device=torch.device("cuda", 0), sm_scale=1.0,
    )  # fmt: skip
    held = []
    for _ in range(2):
        store = HostPool().init(layout, 5000)
        store.grow(6000)
        for batch in range(2):
            staged = store.stage(5500)
            keep_busy()
            staged.copy_(torch.arange(5500, device="cuda")[:, None].remainder(251).expand_as(staged))
            staged += batch
            store.write(batch, 0, staged)
        store.finish_writes()
        token = torch.full((2, NUM_HEADS, 128), 255.0, dtype=torch.bfloat16, device="cuda")
        store.append(torch.full((2, NUM_HEADS), 5500, device="cuda"), token, token)
        twin = copy.deepcopy(store)
        for pool in (store, twin):
            k_slots, v_slots = (
                torch.zeros(2, NUM_HEADS, 3, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)
            )
            incoming = torch.tensor([4999, -1, 5500], device="cuda").expand(2, NUM_HEADS, 3).contiguous()
            pool.recall(incoming, k_slots, v_slots)
            for batch in range(2):
                pool.prefetch(batch, 5501, 2)
                rows = pool.read(batch, 5501, 2)
                expected = torch.arange(5501, device="cuda").remainder(251) + batch
                expected[5500] = 255
                assert torch.equal(rows[:, :5501], expected[:, None].bfloat16().expand(NUM_HEADS, 5501, WIDTH))
                for slots in (k_slots, v_slots):
                    assert bool((slots[batch, :, 0] == expected[4999]).all())
                    assert not bool(slots[batch, :, 1].any()) and bool((slots[batch, :, 2] == 255).all())
        del store, twin, pool, rows
        held.append(pinned_memory().held_bytes)
    assert held[0] == held[1]
