"""`gather_kv` and `store_token` against their definitions, with marked bands round everything they may write."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvframe_kernels import gather_kv as op
from kvframe_kernels.dispatch import KernelError, is_debug
from kvframe_kernels.gather_kv import gather_kv, store_token

CANARY = -777.0


def banded(batch_size: int, num_heads: int, capacity: int, width: int) -> tuple[Tensor, Tensor]:
    """A buffer full of marks, and the slots in its middle."""
    buffer = torch.full((batch_size, num_heads, capacity + 4, width + 2), CANARY, dtype=torch.float64)
    return buffer, buffer[:, :, 2 : 2 + capacity, 1 : 1 + width]


def without_mistakes(rows: Tensor) -> Tensor:
    """Debug mode holds a row below -1 for a mistake."""
    return rows.clamp(min=-1) if is_debug() else rows


@given(
    batch_size=st.integers(1, 2),
    num_heads=st.integers(1, 3),
    capacity=st.integers(0, 9) | st.just(63),
    num_rows=st.integers(1, 20) | st.just(111),
    first_row=st.sampled_from([0, 5, 1000]),
    head_dim=st.sampled_from([1, 4, 7]),
    value_dim=st.sampled_from([1, 4, 5]),
    seed=st.integers(0, 2**16),
)
def test_definition(
    batch_size: int,
    num_heads: int,
    capacity: int,
    num_rows: int,
    first_row: int,
    head_dim: int,
    value_dim: int,
    seed: int,
):
    """A slot gets the row named for it if that lies in this slab; every other slot and the pool stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(batch_size, num_heads, num_rows, head_dim + value_dim, generator=generator, dtype=torch.float64)
    incoming = torch.randint(
        first_row - 3, first_row + num_rows + 3, (batch_size, num_heads, capacity), generator=generator
    )
    incoming[torch.rand(incoming.shape, generator=generator) < 0.3] = -1
    incoming = without_mistakes(incoming)
    k_buffer, k_slots = banded(batch_size, num_heads, capacity, head_dim)
    v_buffer, v_slots = banded(batch_size, num_heads, capacity, value_dim)
    k_expected, v_expected, pool_before = k_buffer.clone(), v_buffer.clone(), pool.clone()
    for batch in range(batch_size):
        for head in range(num_heads):
            for slot, row in enumerate(incoming[batch, head].tolist()):
                if first_row <= row < first_row + num_rows:
                    entry = pool[batch, head, row - first_row]
                    k_expected[batch, head, 2 + slot, 1 : 1 + head_dim] = entry[:head_dim]
                    v_expected[batch, head, 2 + slot, 1 : 1 + value_dim] = entry[head_dim:]
    gather_kv(pool, incoming, first_row, k_slots, v_slots)

    assert torch.equal(k_buffer, k_expected) and torch.equal(v_buffer, v_expected)
    assert torch.equal(pool, pool_before)


@given(
    batch_size=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    num_rows=st.integers(1, 9),
    first_row=st.sampled_from([0, 5, 1000]),
    head_dim=st.sampled_from([1, 4, 7]),
    value_dim=st.sampled_from([1, 4, 5]),
    seed=st.integers(0, 2**16),
)
def test_store_definition(
    batch_size: int, num_heads: int, num_rows: int, first_row: int, head_dim: int, value_dim: int, seed: int
):
    """A head's token lands in the row named for it if that lies in this slab; the rest of the pool stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(batch_size, num_heads, head_dim, generator=generator, dtype=torch.float64)
    values = torch.randn(batch_size, num_heads, value_dim, generator=generator, dtype=torch.float64)
    rows = torch.randint(first_row - 3, first_row + num_rows + 3, (batch_size, num_heads), generator=generator)
    rows[torch.rand(rows.shape, generator=generator) < 0.2] = -1
    rows = without_mistakes(rows)
    buffer, pool = banded(batch_size, num_heads, num_rows, head_dim + value_dim)
    expected = buffer.clone()
    for batch in range(batch_size):
        for head in range(num_heads):
            local = int(rows[batch, head]) - first_row
            if 0 <= local < num_rows:
                expected[batch, head, 2 + local, 1 : 1 + head_dim] = keys[batch, head]
                expected[batch, head, 2 + local, 1 + head_dim : -1] = values[batch, head]
    store_token(pool, rows, first_row, keys, values)

    assert torch.equal(buffer, expected)


def test_debug_mode(monkeypatch: pytest.MonkeyPatch):
    """In debug mode a row that no slab can have is an error; -1 and the rows of other slabs are not."""
    monkeypatch.setattr(op, "is_debug", lambda: True)
    pool, slots = torch.ones(1, 1, 4, 32), torch.zeros(1, 1, 3, 16)
    rows = torch.tensor([[[-1, 2, 9]]])
    gather_kv(pool, rows, 0, slots, slots)
    store_token(pool, rows[..., 0], 0, slots[:, :, 0], slots[:, :, 0])

    with pytest.raises(KernelError, match="gather_kv was given row -2"):
        gather_kv(pool, rows - 1, 0, slots, slots)
    with pytest.raises(KernelError, match="store_token was given row -2"):
        store_token(pool, rows[..., 0] - 1, 0, slots[:, :, 0], slots[:, :, 0])
