"""The kernels of `gather_kv` and `store_token` against their references."""

import pytest
import torch
from guard import Guard, guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvframe_kernels import gather_kv as op
from kvframe_kernels.dispatch import Backend, FallbackWarning, KernelError, _warn_once, is_debug
from kvframe_kernels.gather_kv import gather_kv, store_token

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
WIDTHS = st.sampled_from([16, 48, 80])


@pytest.fixture(scope="module", params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> Backend:
    """Each kernel that can run where the tests run."""
    if request.param == "cuda":
        if device.type != "cuda":
            pytest.skip("CUDA C++ needs a CUDA device")
        pytest.importorskip("cuda.core")
    return request.param


def bits(tensor: Tensor) -> Tensor:
    """What a tensor holds, where NaN equals itself."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random content, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_rows(*shape: int, first_row: int, num_rows: int, empty: float, seed: int) -> Tensor:
    """Runs of rows as units leave them, rows of other slabs among them, and -1 for a share `empty` of the slots."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(first_row - 3, first_row + num_rows + 3, shape, generator=generator)
    rows[..., 1::2] = rows[..., : shape[-1] - 1 : 2] + 1
    far = torch.tensor([-(2**63), 2**63 - 1, -2, 2**31])
    lost = torch.rand(shape, generator=generator) < 0.05
    rows = torch.where(lost, far[torch.randint(0, 4, shape, generator=generator)], rows)
    rows[torch.rand(shape, generator=generator) < empty] = -1
    # Debug mode holds a row below -1 for a mistake.
    return rows.clamp(min=-1) if is_debug() else rows


class Slots:
    """Poisoned slots inside larger buffers, so that the strides of batches and heads are not those of the view."""

    def __init__(self, guard: Guard, *shape: int, width: int, dtype: torch.dtype) -> None:
        batch_size, num_heads, capacity = shape
        self.whole = guard.poisoned(batch_size, num_heads + 1, capacity + 3, width, dtype=dtype)
        self.view = self.whole[:, :num_heads, 2 : 2 + capacity]


@settings(max_examples=25)
@given(
    batch_size=st.integers(1, 2), num_heads=st.integers(1, 3), capacity=st.integers(0, 9) | st.just(67),
    num_rows=st.integers(1, 20), first_row=st.sampled_from([0, 5, 2**33]), head_dim=WIDTHS, value_dim=WIDTHS,
    dtype=DTYPES, empty=st.sampled_from([0.0, 0.5, 1.0]), on_host=st.booleans(),
    num_blocks=st.sampled_from([None, 1, 2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_gather_equals_reference(
    device: torch.device, backend: Backend, batch_size: int, num_heads: int, capacity: int, num_rows: int,
    first_row: int, head_dim: int, value_dim: int, dtype: torch.dtype, empty: float, on_host: bool,
    num_blocks: int | None, seed: int,
) -> None:  # fmt: skip
    """Slots whose row lies in the slab hold it; every other slot, what lies round them and the pool are as before."""
    shape = (batch_size, num_heads, capacity)
    content = random(batch_size, num_heads, num_rows, head_dim + value_dim, dtype=dtype, seed=seed)
    incoming = random_rows(*shape, first_row=first_row, num_rows=num_rows, empty=empty, seed=seed).to(device)
    with guarded(device) as guard:
        pool = guard.copy(content, pinned=on_host)
        incoming = guard.copy(incoming)
        made = [
            (Slots(guard, *shape, width=head_dim, dtype=dtype), Slots(guard, *shape, width=value_dim, dtype=dtype))
            for _ in range(2)
        ]
        (keys, values), (expected_keys, expected_values) = made
        gather_kv(pool, incoming, first_row, expected_keys.view, expected_values.view, backend="reference")
        gather_kv(pool, incoming, first_row, keys.view, values.view, backend=backend, num_blocks=num_blocks)

    assert torch.equal(bits(keys.whole), bits(expected_keys.whole))
    assert torch.equal(bits(values.whole), bits(expected_values.whole))
    assert torch.equal(bits(pool.cpu()), bits(content))


def test_gather_many_slots(device: torch.device, backend: Backend) -> None:
    """More slots than a block looks at in one go, nearly all with nothing to do."""
    capacity, num_rows = (700, 50) if device.type == "cpu" else (70_001, 5_000)
    content = random(1, 2, num_rows, 32, dtype=torch.float16, seed=0)
    incoming = random_rows(1, 2, capacity, first_row=0, num_rows=num_rows, empty=0.98, seed=0).to(device)
    with guarded(device) as guard:
        pool = guard.copy(content, pinned=True)
        keys, values, expected_keys, expected_values = (
            guard.poisoned(1, 2, capacity, 16, dtype=torch.float16) for _ in range(4)
        )
        gather_kv(pool, incoming, 0, expected_keys, expected_values, backend="reference")
        gather_kv(pool, incoming, 0, keys, values, backend=backend, num_blocks=1)

    assert torch.equal(bits(keys), bits(expected_keys)) and torch.equal(bits(values), bits(expected_values))


@settings(max_examples=20)
@given(
    batch_size=st.integers(1, 3), num_heads=st.integers(1, 4), num_rows=st.integers(1, 9),
    first_row=st.sampled_from([0, 5, 2**33]), head_dim=WIDTHS, value_dim=WIDTHS, dtype=DTYPES,
    on_host=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_store_equals_reference(
    device: torch.device, batch_size: int, num_heads: int, num_rows: int, first_row: int, head_dim: int,
    value_dim: int, dtype: torch.dtype, on_host: bool, seed: int,
) -> None:  # fmt: skip
    """A token lands in its row where the slab has that row; the rest of the pool is as before."""
    shape = (batch_size, num_heads)
    content = random(*shape, num_rows, head_dim + value_dim, dtype=dtype, seed=seed)
    # As projections leave them: one tensor [B, 1, H, D + Dv] for both.
    states = random(batch_size, 1, num_heads, head_dim + value_dim, dtype=dtype, seed=seed + 1).to(device)
    keys, values = states.transpose(1, 2)[:, :, 0].split([head_dim, value_dim], -1)
    rows = random_rows(*shape, first_row=first_row, num_rows=num_rows, empty=0.1, seed=seed).to(device)
    with guarded(device) as guard:
        pool, expected = guard.copy(content, pinned=on_host), guard.copy(content, pinned=on_host)
        store_token(expected, rows, first_row, keys, values, backend="reference")
        store_token(pool, rows, first_row, keys, values, backend="triton")

    assert torch.equal(bits(pool), bits(expected))


def test_unserved_layouts(device: torch.device, backend: Backend) -> None:
    """A kernel that is named says what it does not serve."""
    pool = torch.zeros(1, 2, 4, 32, dtype=torch.float16, device=device)
    incoming = torch.full((1, 2, 4), -1, device=device)
    slots = torch.zeros(1, 2, 4, 16, dtype=torch.float16, device=device)
    turned = torch.zeros(1, 4, 2, 16, dtype=torch.float16, device=device).transpose(1, 2)
    shifted = torch.zeros(1 * 2 * 4 * 16 + 1, dtype=torch.float16, device=device)[1:].view(1, 2, 4, 16)

    with pytest.raises(KernelError, match="k_slots are not contiguous"):
        gather_kv(pool, incoming, 0, turned, slots, backend=backend)
    with pytest.raises(KernelError, match="v_slots does not start at a multiple of 16 bytes"):
        gather_kv(pool, incoming, 0, slots, shifted, backend=backend)
    with pytest.raises(KernelError, match="int32"):
        gather_kv(pool, incoming.int(), 0, slots, slots, backend=backend)
    with pytest.raises(KernelError, match="multiples of 16"):
        gather_kv(pool, incoming, 0, slots[..., :8], slots, backend=backend)
    with pytest.raises(KernelError, match="float32"):
        gather_kv(pool.float(), incoming, 0, slots, slots, backend=backend)
    with pytest.raises(ValueError, match="v_slots has shape"):
        gather_kv(pool, incoming, 0, slots, slots[:, :, :3], backend=backend)
    with pytest.raises(ValueError, match="num_blocks"):
        gather_kv(pool, incoming, 0, slots, slots, backend=backend, num_blocks=0)


# ---- on a CUDA device only ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu(device: torch.device) -> torch.device:
    """A CUDA device."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


def test_unpinned_pool(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool out of the device's reach goes through the reference, with a warning; in debug mode it is an error."""
    pool = random(1, 2, 4, 32, dtype=torch.float16, seed=0)
    incoming = torch.tensor([3, -1, 0], device=gpu).expand(1, 2, 3).contiguous()
    keys, values = torch.zeros(2, 1, 2, 3, 16, dtype=torch.float16, device=gpu)
    monkeypatch.setattr(op, "is_debug", lambda: False)
    _warn_once.cache_clear()

    with pytest.warns(FallbackWarning, match="not pinned"):
        gather_kv(pool, incoming, 0, keys, values)
    assert torch.equal(keys[:, :, 0].cpu(), pool[:, :, 3, :16]) and torch.equal(
        values[:, :, 2].cpu(), pool[:, :, 0, 16:]
    )
    monkeypatch.setattr(op, "is_debug", lambda: True)
    with pytest.raises(KernelError, match="not pinned"):
        gather_kv(pool, incoming, 0, keys, values)
    with pytest.raises(KernelError, match="not pinned"):
        store_token(pool, incoming[..., 0], 0, keys[:, :, 0], values[:, :, 0])


def test_captured(gpu: torch.device, backend: Backend) -> None:
    """In a CUDA graph a gather sees new rows, and what the host and `store_token` have written since."""
    pool = random(2, 2, 64, 256, dtype=torch.bfloat16, seed=0).pin_memory()
    incoming = torch.full((2, 2, 40), -1, device=gpu)
    keys, values = torch.zeros(2, 2, 2, 40, 128, dtype=torch.bfloat16, device=gpu)
    rows = torch.full((2, 2), -1, device=gpu)
    token = torch.zeros(2, 2, 2, 128, dtype=torch.bfloat16, device=gpu)

    def step() -> None:
        store_token(pool, rows, 0, token[0], token[1], backend="triton")
        gather_kv(pool, incoming, 0, keys, values, backend=backend)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(3):
        torch.cuda.synchronize()
        pool.copy_(random(2, 2, 64, 256, dtype=torch.bfloat16, seed=seed + 10))
        token.copy_(random(2, 2, 2, 128, dtype=torch.bfloat16, seed=seed + 20))
        rows.fill_(7 + seed)
        incoming.copy_(random_rows(2, 2, 40, first_row=0, num_rows=64, empty=0.3, seed=seed))
        incoming[..., 0] = 7 + seed
        expected_keys, expected_values = keys.clone(), values.clone()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(pool[:, :, 7 + seed].to(gpu), torch.cat([token[0], token[1]], -1))
        gather_kv(pool, incoming, 0, expected_keys, expected_values, backend="reference")
        assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)


def test_beyond_int32(gpu: torch.device, backend: Backend) -> None:
    """The last rows of a pool of more than 2^31 elements."""
    num_rows = 2**31 // 32 + 5
    if torch.cuda.mem_get_info(gpu)[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    pool = torch.empty(1, 1, num_rows, 32, dtype=torch.bfloat16, device=gpu)
    tail = random(1, 1, 8, 32, dtype=torch.bfloat16, seed=0).to(gpu)
    pool[:, :, -8:] = tail
    token = random(2, 1, 1, 16, dtype=torch.bfloat16, seed=1).to(gpu)
    store_token(pool, torch.tensor([[num_rows - 1]], device=gpu), 0, token[0], token[1], backend="triton")
    tail[:, :, -1] = torch.cat([token[0], token[1]], -1)
    incoming = torch.tensor([[[num_rows - 1, num_rows - 8, -1, num_rows, num_rows - 3]]], device=gpu)
    with guarded(gpu) as guard:
        keys, values = (guard.poisoned(1, 1, 5, 16, dtype=torch.bfloat16) for _ in range(2))
        gather_kv(pool, incoming, 0, keys, values, backend=backend)

    slots = torch.cat([keys, values], -1)[0, 0]
    assert torch.equal(slots[[0, 1, 4]], tail[0, 0, [7, 0, 5]])
    assert slots[[2, 3]].isnan().all()
