"""Which tokens a store that drops still has, against sets of rows."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvframe.memory.survivors import Survivors
from kvframe.testing.cases import make_layout
from kvframe.types import LeavingUnits

LAYOUT = make_layout(batch_size=1, num_kv_heads=2)
NUM_ROWS = 12

rows = st.sets(st.integers(0, NUM_ROWS - 1))


def mask(*heads: set[int]) -> Tensor:
    """bool [1, 2, R] of two heads' rows."""
    return torch.tensor([[[row in own for row in range(NUM_ROWS)] for own in heads]])


def alive(survivors: Survivors) -> list[set[int]]:
    """The rows that are left, of each head."""
    return [set(own.nonzero()[:, 0].tolist()) for own in survivors.alive[0]]


@given(steps=st.lists(st.tuples(rows, rows), max_size=4), length=st.integers(0, NUM_ROWS - 4))
def test_what_steps_keep(steps: list[tuple[set[int], set[int]]], length: int):
    """A row is left if every step attended to it that found it there; rows to come are."""
    survivors = Survivors(LAYOUT, NUM_ROWS)
    expected = [set(range(NUM_ROWS)), set(range(NUM_ROWS))]
    for step, attended in enumerate(steps):
        survivors.keep(mask(*attended), torch.full((1, 2), length + step))
        there = set(range(length + step))
        expected = [left - (there - own) for left, own in zip(expected, attended)]

    assert alive(survivors) == expected
    survivors.forget()
    assert survivors.alive.all()


@given(left=st.tuples(rows, rows), attended=st.tuples(rows, rows), start=st.integers(0, 8), size=st.integers(1, 4))
def test_what_leaves_outside_of_a_step(
    left: tuple[set[int], set[int]], attended: tuple[set[int], set[int]], start: int, size: int
):
    """Of a unit that leaves, what is not attended to is gone; a head whose unit stays loses nothing."""
    survivors = Survivors(LAYOUT, NUM_ROWS)
    survivors.alive.copy_(mask(*left))
    keys, values = LAYOUT.zeros(1)
    unit = LeavingUnits(
        leaves=torch.tensor([[True, False]]), column=torch.zeros(1, 2, dtype=torch.int64),
        start=torch.full((1, 2), start), size=torch.full((1, 2), size), max_size=4,
        keys=keys, values=values, ring_first=0, ring_size=1,
    )  # fmt: skip
    survivors.lose(unit, mask(*attended))
    unit_rows = set(range(start, start + size))

    assert alive(survivors) == [left[0] - (unit_rows - attended[0]), left[1]]


@given(left=st.tuples(rows, rows), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), first=st.integers(0, 2))
def test_units_of_which_something_is_left(left: tuple[set[int], set[int]], sizes: list[int], first: int):
    """One token of a unit is enough."""
    survivors = Survivors(LAYOUT, NUM_ROWS)
    survivors.alive.copy_(mask(*left))
    bounds = [first + sum(sizes[:unit]) for unit in range(len(sizes) + 1)]
    found = survivors.units(torch.tensor(bounds).expand(1, 2, -1), len(sizes))
    expected = [[bool(own & set(range(*bounds[unit : unit + 2]))) for unit in range(len(sizes))] for own in left]

    assert found.tolist() == [expected]


@given(left=st.tuples(rows, rows), wanted=st.lists(st.integers(0, NUM_ROWS - 1), unique=True, max_size=5))
def test_what_is_left_of_a_selection(left: tuple[set[int], set[int]], wanted: list[int]):
    """The rows that are left, in their order and without gaps."""
    survivors = Survivors(LAYOUT, NUM_ROWS)
    survivors.alive.copy_(mask(*left))
    padded = wanted + [-1] * (6 - len(wanted))
    found, count = survivors.among(torch.tensor(padded).expand(1, 2, -1))
    expected = [[row for row in wanted if row in own] for own in left]

    assert count.tolist() == [[len(own) for own in expected]]
    assert found.tolist() == [[own + [-1] * (6 - len(own)) for own in expected]]


def test_room():
    """Rows to come are alive."""
    survivors = Survivors(LAYOUT, 3)
    survivors.alive.fill_(False)
    survivors.reserve(5)
    survivors.reserve(4)

    assert survivors.alive.tolist() == [[[False, False, False, True, True]] * 2]
    assert survivors.of(0, 2) is not None and survivors.nbytes() == 10
    survivors.forget()
    assert survivors.of(0, 5) is None
