"""`select_units`, `select_runs` and `resident_difference` against their definitions, in Python lists."""

import math

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kvframe_kernels.select_units import resident_difference, select_candidates, select_runs, select_units

Head = tuple[list[float], list[int]]


def take(scores: list[float], sizes: list[int], start: int, budget: int) -> list[int]:
    """Rows of whole units by falling score, the lower unit first where scores are equal, cut at the budget."""
    ranked = sorted((unit for unit in range(len(scores)) if scores[unit] > -math.inf), key=lambda u: (-scores[u], u))
    firsts = [start + sum(sizes[:unit]) for unit in range(len(sizes))]
    rows = [row for unit in ranked for row in range(firsts[unit], firsts[unit] + sizes[unit])]
    return rows[:budget]


@st.composite
def heads(draw: st.DrawFn) -> list[Head]:
    """Scores, many of them equal, and unit sizes; not every head has units."""
    count = draw(st.integers(1, 4))
    score = st.sampled_from([0.0, 0.25, 0.5, -1.0]) | st.floats(-4, 4)
    head = st.lists(st.tuples(score, st.integers(1, 7)), max_size=14)
    return [
        ([s for s, _ in each], [n for _, n in each]) for each in draw(st.lists(head, min_size=count, max_size=count))
    ]


def pack(parts: list[Head], start: int, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [1, H, U] and offsets [1, H, U + 1 + room]; behind the last unit of a head the offsets are meaningless."""
    width = max(len(scores) for scores, _ in parts)
    padded = [scores + [-math.inf] * (width - len(scores)) for scores, _ in parts]
    offsets = [
        [start + sum(sizes[:unit]) for unit in range(len(sizes) + 1)] + [-777] * (width - len(sizes) + room)
        for _, sizes in parts
    ]
    return torch.tensor([padded], dtype=torch.float64), torch.tensor([offsets])


@given(parts=heads(), start=st.integers(0, 5), room=st.integers(0, 3), budget=st.integers(1, 70))
@example(parts=[([], [])], start=2, room=0, budget=5)
@example(parts=[([0.5] * 9, [3] * 9)], start=0, room=0, budget=63)
def test_select_definition(parts: list[Head], start: int, room: int, budget: int):
    """Each head gets the rows of its best units, cut so that a budget that can be met is met exactly."""
    scores, offsets = pack(parts, start, room)
    rows, count = select_units(scores, offsets, budget)

    assert rows.shape == (1, len(parts), budget) and rows.dtype == count.dtype == torch.int64
    for head, (head_scores, sizes) in enumerate(parts):
        expected = take(head_scores, sizes, start, budget)
        assert int(count[0, head]) == len(expected) == min(budget, sum(sizes))
        assert rows[0, head].tolist() == expected + [-1] * (budget - len(expected))


def test_a_scorer_may_rule_units_out():
    """A score of -inf in the middle is a unit that is not taken, even where there is room."""
    scores = torch.tensor([[[0.1, -math.inf, 0.2]]])
    rows, count = select_units(scores, torch.tensor([[[4, 6, 9, 10]]]), 8)

    assert rows.tolist() == [[[9, 4, 5, -1, -1, -1, -1, -1]]] and count.tolist() == [[3]]


@st.composite
def residents(draw: st.DrawFn) -> tuple[int, list[tuple[list[int], list[int], bool]]]:
    """Rows of the pool; for some heads of one capacity the row in each slot, the wanted rows, and whether they are
    due."""
    num_rows = draw(st.integers(1, 20))
    capacity = draw(st.integers(1, 12))
    rows = st.permutations(range(num_rows))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        held = draw(rows)[: draw(st.integers(0, capacity))]
        slots = draw(st.permutations(held + [-1] * (capacity - len(held))))
        wanted = draw(rows)[: draw(st.integers(0, capacity))]
        parts.append((list(slots), list(wanted), draw(st.booleans())))
    return num_rows, parts


def exchange(slots: list[int], wanted: list[int], due: bool) -> tuple[list[int], list[int]]:
    """New contents of the slots, and the row that comes into each."""
    if not due:
        return slots, [-1] * len(slots)
    missing = [row for row in wanted if row not in slots]
    after, incoming = [], []
    for row in slots:
        stays = row >= 0 and row in wanted
        comes = -1 if stays or not missing else missing.pop(0)
        after.append(row if stays else comes)
        incoming.append(comes)
    return after, incoming


@given(state=residents())
def test_difference_definition(state: tuple[int, list[tuple[list[int], list[int], bool]]]):
    """What is wanted stays in its slot, the i-th missing row comes into the i-th free one, and nothing else moves."""
    num_rows, parts = state
    capacity = len(parts[0][0])
    slots = torch.tensor([[slots for slots, _, _ in parts]])
    wanted = torch.tensor([[rows + [-1] * (capacity - len(rows)) for _, rows, _ in parts]])
    due = torch.tensor([[due for _, _, due in parts]])
    before = (slots.clone(), wanted.clone(), due.clone())
    after, incoming = resident_difference(slots, wanted, due, num_rows)

    assert all(torch.equal(one, other) for one, other in zip(before, (slots, wanted, due), strict=True))
    for head, part in enumerate(parts):
        assert (after[0, head].tolist(), incoming[0, head].tolist()) == exchange(*part)


def test_candidates():
    """The same rows, ascending, with none behind them; and their units."""
    scores, offsets = pack([([0.1, 0.9, 0.4], [3, 2, 2]), ([], [])], 5, 1)
    rows, count, unit_ids = select_candidates(scores, offsets, 5)

    assert rows.tolist() == [[[5, 8, 9, 10, 11], [-1] * 5]] and count.tolist() == [[5, 0]]
    assert unit_ids[0, 0].tolist() == [0, 1, 1, 2, 2] and unit_ids.dtype == torch.int32


@given(
    scores=st.lists(st.sampled_from([0.0, 0.125, 0.5, 1.0]), min_size=1, max_size=17), run_length=st.integers(1, 5),
    budget=st.integers(1, 20), behind=st.integers(0, 6), due=st.sampled_from([None, True, False]),
)  # fmt: skip
def test_select_runs_definition(
    scores: list[float], run_length: int, budget: int, behind: int, due: bool | None
) -> None:
    """Neighbouring candidates together, by the sum of their scores, the lower run first where that is equal; the last
    run may be shorter, and what is behind the count does not exist."""
    number = len(scores)
    rows = torch.tensor([[[3 * place + 2 for place in range(number)] + [-5] * behind]])
    given_scores = torch.tensor([[scores + [-math.inf] * behind]], dtype=torch.float64)
    flags = None if due is None else torch.tensor([[due]])
    if due is False:
        number = 0
    taken, count = select_runs(given_scores, rows, torch.tensor([[len(scores)]]), run_length, budget, due=flags)
    runs = [range(start, min(start + run_length, number)) for start in range(0, number, run_length)]
    runs.sort(key=lambda run: -sum(scores[place] for place in run))
    expected = [3 * place + 2 for run in runs for place in run][:budget]

    assert taken.shape == (1, 1, budget) and count.tolist() == [[len(expected)]]
    assert taken[0, 0].tolist() == expected + [-1] * (budget - len(expected))
