"""Transfers: rows that were written come back, and every byte on the link is counted."""

import copy

import pytest
import torch
from helpers import stage_id
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvframe import HostPool, KeepOnDevice, LayerLayout, Transfer
from kvframe.memory.pool import RowStore
from kvframe.testing.cases import make_layout, make_text
from kvframe.testing.small import small_stages

every_transfer = pytest.mark.parametrize("transfer", small_stages("transfer"), ids=stage_id)
LAYOUT = make_layout(batch_size=3, num_kv_heads=2, head_dim=4, value_dim=5)
NUM_ROWS = 40


def block(transfer: Transfer, rows: Tensor) -> Tensor:
    """What comes back of rows [H, n, D + Dv] of a prompt."""
    codec = transfer.codec(LAYOUT)
    return rows if codec is None else codec.block(rows)


def tokens(transfer: Transfer, rows: Tensor) -> Tensor:
    """What comes back of rows [..., D + Dv] that are stored one by one."""
    codec = transfer.codec(LAYOUT)
    return rows if codec is None else codec.tokens(rows)


def write(store: RowStore, batch: int, start: int, rows: Tensor) -> None:
    """Rows [H, n, D + Dv], the way a prompt's come."""
    staged = store.stage(rows.shape[1])
    assert staged.shape == rows.shape and staged.dtype == rows.dtype
    store.write(batch, start, staged.copy_(rows))


def filled(transfer: Transfer, first: int = 12) -> tuple[RowStore, Tensor]:
    """A store planned for a few rows and grown twice, filled in blocks and row by row; and what comes back of it."""
    text = make_text(LAYOUT, NUM_ROWS, 0)
    given_rows = torch.cat([text.keys, text.values], -1)
    expected = tokens(transfer, given_rows)
    store = transfer.init(LAYOUT, first)
    for batch in range(LAYOUT.batch_size):
        write(store, batch, 0, given_rows[batch, :, :first])
        expected[batch, :, :first] = block(transfer, given_rows[batch, :, :first])
    store.grow(first + 3)
    store.grow(NUM_ROWS)
    for batch, start in enumerate((first + 1, first + 2, NUM_ROWS)):
        write(store, batch, first, given_rows[batch, :, first:start])
        expected[batch, :, first:start] = block(transfer, given_rows[batch, :, first:start])
    store.finish_writes()
    # Every head is at a row of its own, as the sequences of a batch with padding are, until all are full.
    batches, heads = torch.arange(LAYOUT.batch_size)[:, None], torch.arange(LAYOUT.num_kv_heads)
    starts = torch.tensor([[first + 1, first], [first + 2, first + 1], [NUM_ROWS, first]])
    for step in range(NUM_ROWS):
        rows = (starts + step).clamp(max=NUM_ROWS - 1)
        store.append(rows, text.keys[batches, heads, rows], text.values[batches, heads, rows])
        expected[batches, heads, rows] = tokens(transfer, given_rows[batches, heads, rows])
    return store, expected


def slots(capacity: int) -> tuple[Tensor, Tensor]:
    """Resident slots in the middle of larger buffers, marked."""
    k_slots, v_slots = LAYOUT.zeros(capacity + 4)
    return k_slots.fill_(-777)[:, :, 2:-2], v_slots.fill_(-777)[:, :, 2:-2]


@every_transfer
@pytest.mark.parametrize("room", [0, 1, 7])
def test_rows_written_are_rows_read(transfer: Transfer, room: int):
    """Whatever slab a row lies in, however it came there, and with or without a hint; behind them is room to fill."""
    store, expected = filled(transfer)

    assert store.num_rows == NUM_ROWS
    for batch in range(LAYOUT.batch_size):
        for stop in (0, 1, 12, 13, 15, 16, NUM_ROWS):
            if stop % 2:
                store.prefetch(batch, stop, room)
            rows = store.read(batch, stop, room)
            assert rows.shape == (2, stop + room, 9)
            rows[:, stop:] = torch.nan
            assert torch.equal(rows[:, :stop], expected[batch, :, :stop])


@every_transfer
def test_rows_need_not_be_staged(transfer: Transfer):
    """A tensor of the caller's own is written too, and so is a part of a staged one."""
    store = transfer.init(LAYOUT, 9)
    rows = torch.randn(2, 9, 9, dtype=LAYOUT.dtype)
    store.write(1, 0, rows[:, :4])
    staged = store.stage(9).copy_(rows)
    store.write(1, 6, staged[:, 6:])
    store.write(1, 4, staged[:, 4:6])

    expected = torch.cat([block(transfer, rows[:, start:stop]) for start, stop in ((0, 4), (4, 6), (6, 9))], 1)
    assert torch.equal(store.read(1, 9), expected)


@every_transfer
def test_what_is_read_stays_for_one_more_read(transfer: Transfer):
    """Even where the next but one is on its way already when the last one is used; the store keeps its own."""
    store, expected = filled(transfer)
    first = store.read(0, 20, 3)
    store.prefetch(1, 25)
    second = store.read(1, 25)
    assert torch.equal(first[:, :20], expected[0, :, :20])
    store.prefetch(2, 30)
    assert torch.equal(second, expected[1, :, :25])
    second.fill_(torch.nan)

    assert torch.equal(store.read(2, 30), expected[2, :, :30])
    assert torch.equal(store.read(1, 25), expected[1, :, :25])


@every_transfer
@pytest.mark.parametrize("how", ["write", "append"])
def test_a_hint_does_not_age(transfer: Transfer, how: str):
    """What changes after it is read as it is then."""
    store, expected = filled(transfer)
    store.prefetch(0, 20)
    expected = expected.clone()
    fresh = torch.randn(3, 2, 1, 9, generator=torch.Generator().manual_seed(1), dtype=LAYOUT.dtype)
    if how == "write":
        write(store, 0, 5, fresh[0])
        expected[0, :, 5:6] = block(transfer, fresh[0])
    else:
        store.append(torch.full((3, 2), 5), fresh[:, :, 0, :4], fresh[:, :, 0, 4:])
        expected[:, :, 5] = tokens(transfer, fresh[:, :, 0])

    assert torch.equal(store.read(0, 20), expected[0, :, :20])


@every_transfer
@given(seed=st.integers(0, 2**16), capacity=st.integers(1, 20))
def test_recalled_rows(transfer: Transfer, seed: int, capacity: int):
    """Every slot gets the row named for it, from whichever slab; slots with no row named stay as they are."""
    store, expected = filled(transfer)
    generator = torch.Generator().manual_seed(seed)
    incoming = torch.randint(0, NUM_ROWS, (3, 2, capacity), generator=generator)
    incoming[torch.rand(incoming.shape, generator=generator) < 0.4] = -1
    k_slots, v_slots = slots(capacity)
    k_expected, v_expected = k_slots.clone(), v_slots.clone()
    for batch, head, slot in (incoming >= 0).nonzero().tolist():
        row = int(incoming[batch, head, slot])
        k_expected[batch, head, slot], v_expected[batch, head, slot] = expected[batch, head, row].split([4, 5])
    store.recall(incoming, k_slots, v_slots)

    assert torch.equal(k_slots, k_expected) and torch.equal(v_slots, v_expected)


@every_transfer
def test_bytes_over_the_link(transfer: Transfer):
    """A store on the host counts what a prompt writes and reads, once; of one on the device nothing crosses the
    link."""
    store, _ = filled(transfer)
    row_bytes = transfer.row_bytes(LAYOUT) if transfer.crosses_link else 0
    written = 2 * (3 * 12 + (1 + 2 + 28))
    store.prefetch(1, 29)
    store.prefetch(1, 30, 5)
    store.read(1, 30, 5)

    assert store.traffic.bytes_to_host == written * row_bytes
    assert store.traffic.bytes_to_device(12) == (2 * 30 + 12) * row_bytes
    store.traffic.clear()
    assert (store.traffic.bytes_to_host, store.traffic.bytes_to_device(0)) == (0, 0)
    assert (store.host_bytes() > 0) == transfer.crosses_link


def test_rows_as_they_are():
    """A row of a pool takes its numbers."""
    assert HostPool().row_bytes(LAYOUT) == KeepOnDevice().row_bytes(LAYOUT) == (4 + 5) * 8


@every_transfer
def test_deep_copy(transfer: Transfer):
    """A copy holds the same rows and counts, and shares nothing with the original."""
    store, expected = filled(transfer)
    store.recall(torch.zeros(3, 2, 1, dtype=torch.int64), *slots(1))
    twin = copy.deepcopy(store)
    written = store.traffic.rows_written
    write(store, 0, 0, torch.zeros(2, NUM_ROWS, 9, dtype=torch.float64))
    store.recall(torch.zeros(3, 2, 1, dtype=torch.int64), *slots(1))
    store.grow(NUM_ROWS + 5)

    assert twin.num_rows == NUM_ROWS and torch.equal(twin.read(0, NUM_ROWS), expected[0])
    assert twin.traffic.rows_written == written < store.traffic.rows_written
    assert type(twin) is type(store)


layouts = st.builds(
    make_layout,
    batch_size=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    value_dim=st.integers(1, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)


@every_transfer
@given(layout=layouts, num_rows=st.integers(1, 63))
def test_host_memory_is_known_beforehand(transfer: Transfer, layout: LayerLayout, num_rows: int):
    """What `host_bytes` says a store will take is what it takes: every row, where they lie on the host. The others lie
    on the device; and there is what a codec keeps for decoding."""
    store = transfer.init(layout, num_rows)
    stored = num_rows * transfer.row_bytes(layout) * layout.batch_size * layout.num_kv_heads

    assert store.num_rows == num_rows
    assert transfer.host_bytes(layout, num_rows) == store.host_bytes() == (stored if transfer.crosses_link else 0)
    if transfer.codec(layout) is None:
        assert store.host_bytes() + store.device_bytes() == stored


def test_growing_moves_nothing():
    """What is stored stays where it is, so that addresses handed to a kernel stay valid."""
    store = HostPool().init(LAYOUT, 10)
    first = store._slabs[0][1].data_ptr()
    store.grow(5)
    assert store.num_rows == 10
    store.grow(11)

    assert store.num_rows == 11 and store._slabs[0][1].data_ptr() == first
