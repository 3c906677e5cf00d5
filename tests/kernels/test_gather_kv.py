"""`gather_kv` against its definition, with marked bands round everything it may write."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvframe_kernels.gather_kv import gather_kv

CANARY = -777.0


def banded(batch_size: int, num_heads: int, capacity: int, width: int) -> tuple[Tensor, Tensor]:
    """A buffer full of marks, and the slots in its middle."""
    buffer = torch.full((batch_size, num_heads, capacity + 4, width + 2), CANARY, dtype=torch.float64)
    return buffer, buffer[:, :, 2 : 2 + capacity, 1 : 1 + width]


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
