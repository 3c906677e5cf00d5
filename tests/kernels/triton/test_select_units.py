"""The kernels of `select_units`, `select_runs` and `exchange_resident` against their references."""

import pytest
import torch
from guard import guarded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvframe_kernels.append_token import NUM_COUNTS, Slots
from kvframe_kernels.select_units import NUM_TALLIES, exchange_resident, select_candidates, select_runs, select_units
from kvframe_kernels.select_units import triton_kernel as kernels


def random_units(heads: tuple[int, int], num_units: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scores, many of them equal or ruled out, and offsets of units of one to six tokens."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(*heads, num_units, generator=generator)
    if seed % 2:
        scores = (2 * scores).round() / 2
    scores[torch.rand(*heads, num_units, generator=generator) < 0.2] = -torch.inf
    sizes = torch.randint(1, 7, (*heads, num_units), generator=generator)
    offsets = torch.zeros(*heads, num_units + 2, dtype=torch.int64)
    offsets[..., 1:-1] = sizes.cumsum(-1)
    return scores, offsets


@settings(max_examples=15)
@given(
    heads=st.sampled_from([(1, 1), (2, 3)]), num_units=st.sampled_from([1, 2, 7, 20, 33, 100]),
    budget=st.integers(1, 90), tile=st.sampled_from([16, 64, 8192]), seed=st.integers(0, 99),
)  # fmt: skip
def test_select_equals_reference(
    device: torch.device, heads: tuple[int, int], num_units: int, budget: int, tile: int, seed: int
) -> None:
    """The same rows, whatever their order, in one tile or in several; nothing where nothing is due."""
    scores, offsets = (tensor.to(device) for tensor in random_units(heads, num_units, seed))
    due = torch.rand(heads, generator=torch.Generator().manual_seed(seed)).to(device) < 0.7
    expected, expected_count = select_units(scores, offsets, budget, backend="reference")
    with pytest.MonkeyPatch.context() as patch, guarded(device) as guard:
        patch.setattr(kernels, "_MAX_TILE", tile)
        scores, offsets = guard.copy(scores), guard.copy(offsets)
        rows, count = select_units(scores, offsets, budget, due=due, backend="triton")
        candidates = select_candidates(scores, offsets, budget, due=due, backend="triton")

    assert rows.shape == expected.shape and count.shape == expected_count.shape
    for head in due.nonzero().tolist():
        mine, theirs = rows[*head], expected[*head]
        assert torch.equal(count[*head], expected_count[*head])
        assert torch.equal(mine.sort().values, theirs.sort().values)
        assert (mine[: int(count[*head])] >= 0).all()
    wanted = select_candidates(scores, offsets, budget, backend="reference")
    there = due[..., None] & (torch.arange(budget, device=device) < expected_count[..., None])
    assert torch.equal(candidates[0][due], wanted[0][due]) and torch.equal(candidates[1][due], wanted[1][due])
    assert torch.equal(candidates[2][there], wanted[2][there])


def test_select_at_full_size(device: torch.device) -> None:
    """As many units as a long context has."""
    if device.type == "cpu":
        pytest.skip("too large for the interpreter")
    for num_units, budget in ((8192, 1024), (8400, 1000), (131072, 1024), (9000, 3000)):
        scores, offsets = (tensor.to(device) for tensor in random_units((2, 8), num_units, 2))
        scores = scores.softmax(-1)
        expected, expected_count = select_units(scores, offsets, budget, backend="reference")
        rows, count = select_units(scores, offsets, budget, backend="triton")
        assert torch.equal(count, expected_count)
        assert torch.equal(rows.sort(-1).values, expected.sort(-1).values)


@settings(max_examples=8)
@given(
    heads=st.sampled_from([(1, 1), (2, 3)]), num_candidates=st.sampled_from([1, 7, 33, 100]),
    run_length=st.sampled_from([1, 2, 3, 16]), budget=st.integers(1, 40), tile=st.sampled_from([16, 8192]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_runs_equal_reference(
    device: torch.device, heads: tuple[int, int], num_candidates: int, run_length: int, budget: int, tile: int,
    seed: int,
) -> None:  # fmt: skip
    """The same rows, in the order of the candidates; what is behind the count is not looked at."""
    check_runs(device, heads, num_candidates, run_length, budget, tile, seed)


def check_runs(
    device: torch.device, heads: tuple[int, int], num_candidates: int, run_length: int, budget: int, tile: int,
    seed: int,
) -> None:  # fmt: skip
    """Scores whose sums are exact, so that nothing but the rule decides."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 9 if seed % 2 else 1 << 12, (*heads, num_candidates), generator=generator) / 4096
    rows = torch.rand(*heads, 3 * num_candidates, generator=generator).argsort(-1)[..., :num_candidates].sort(-1).values
    count = torch.randint(0, num_candidates + 1, heads, generator=generator)
    count[0, 0] = num_candidates
    due = torch.rand(heads, generator=generator) < 0.7
    behind = torch.arange(num_candidates) >= count[..., None]
    scores, rows = scores.masked_fill(behind, torch.nan), rows.masked_fill(behind, -7)
    expected, expected_count = select_runs(scores, rows, count, run_length, budget, due=due, backend="reference")
    with pytest.MonkeyPatch.context() as patch, guarded(device) as guard:
        patch.setattr(kernels, "_MAX_TILE", tile)
        arguments = (guard.copy(scores), guard.copy(rows), guard.copy(count))
        taken, number = select_runs(*arguments, run_length, budget, due=guard.copy(due), backend="triton")

    assert taken.shape == expected.shape
    for head in due.nonzero().tolist():
        mine = taken[*head].cpu()
        assert int(number[*head]) == int(expected_count[*head])
        in_order = mine[: int(number[*head])].diff() > 0
        assert in_order.all() and torch.equal(mine.sort().values, expected[*head].sort().values)


def test_runs_at_full_size(device: torch.device) -> None:
    """As many candidates as a large budget has."""
    if device.type == "cpu":
        pytest.skip("too large for the interpreter")
    for num_candidates, run_length, budget in ((4096, 1, 1024), (4096, 4, 1000), (30_000, 3, 7000)):
        check_runs(device, (2, 8), num_candidates, run_length, budget, 8192, seed=4)


@settings(max_examples=12)
@given(
    heads=st.sampled_from([(1, 1), (2, 3)]), capacity=st.sampled_from([1, 6, 40, 130]), sink_size=st.integers(0, 3),
    tile=st.sampled_from([16, 1024]), seed=st.integers(0, 99),
)  # fmt: skip
def test_exchange_equals_reference(
    device: torch.device, heads: tuple[int, int], capacity: int, sink_size: int, tile: int, seed: int
) -> None:
    """Over several selections: the same residents in the same slots, counters and incoming rows; no mark stays."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = capacity + 1 + seed % 100

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.stack(
            [torch.randperm(num_rows, generator=generator)[:capacity] for _ in range(heads[0] * heads[1])]
        )
        count = torch.randint(0, capacity + 1, (*heads,), generator=generator)
        rows = rows.view(*heads, capacity).masked_fill(torch.arange(capacity) >= count[..., None], -1)
        return rows.to(device), count.to(device)

    with pytest.MonkeyPatch.context() as patch, guarded(device) as guard:
        patch.setattr(kernels, "_SLOT_TILE", tile)
        states = []
        for _ in range(2):
            slots = Slots(
                keys=torch.empty(0), values=torch.empty(0),
                bias=guard.empty(*heads, sink_size + capacity + 3, dtype=torch.float32).fill_(-torch.inf),
                resident_rows=guard.empty(*heads, capacity, dtype=torch.int64).fill_(-1), sink_size=sink_size,
            )  # fmt: skip
            counts = guard.empty(NUM_COUNTS, *heads, dtype=torch.int64).zero_()
            tallies = guard.empty(NUM_TALLIES, *heads, dtype=torch.int64).zero_()
            states.append((slots, counts, tallies))
        marks = guard.empty(*heads, (num_rows + 31) // 32, dtype=torch.int32).zero_()
        for _ in range(4):
            rows, count = draw()
            due = (torch.rand(heads, generator=generator) < 0.7).to(device)
            mine, theirs = (
                exchange_resident(slots, counts, rows, count, due, tallies, marks, num_rows, backend=backend)
                for (slots, counts, tallies), backend in zip(states, ("triton", "reference"), strict=True)
            )
            assert torch.equal(mine, theirs)
            assert not marks.any()
            assert torch.equal(states[0][0].resident_rows, states[1][0].resident_rows)
            assert torch.equal(states[0][0].bias, states[1][0].bias)
            assert torch.equal(states[0][1], states[1][1])
            assert torch.equal(states[0][2], states[1][2])


def test_a_row_outside_the_pool_is_not_selected(device: torch.device) -> None:
    """Neither its mark nor its slot is touched."""
    with guarded(device) as guard:
        slots = Slots(
            keys=torch.empty(0), values=torch.empty(0),
            bias=guard.empty(1, 1, 6, dtype=torch.float32).fill_(-torch.inf),
            resident_rows=guard.empty(1, 1, 4, dtype=torch.int64).fill_(-1), sink_size=1,
        )  # fmt: skip
        counts = guard.empty(NUM_COUNTS, 1, 1, dtype=torch.int64).zero_()
        tallies = guard.empty(NUM_TALLIES, 1, 1, dtype=torch.int64).zero_()
        marks = guard.empty(1, 1, 2, dtype=torch.int32).zero_()
        rows = guard.copy(torch.tensor([[[3, 10**9, 40, -1]]]))
        count, due = torch.tensor([[3]]).to(device), torch.tensor([[True]]).to(device)
        incoming = exchange_resident(slots, counts, rows, count, due, tallies, marks, 40, backend="triton")

    assert incoming.tolist() == [[[3, -1, -1, -1]]]
