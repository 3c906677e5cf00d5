"""`unattended_tokens` against its definition, in Python numbers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvframe_kernels.unattended_tokens import unattended_tokens


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    num_units=st.integers(0, 6),
    first=st.integers(0, 3),
    resident=st.sets(st.integers(0, 40), max_size=12),
    data=st.data(),
)
def test_unattended_tokens(sizes: list[int], num_units: int, first: int, resident: set[int], data: st.DataObject):
    """Of every unit, the rows that are not resident; empty slots, and rows of no unit, do not count."""
    num_units = min(num_units, len(sizes))
    slots = data.draw(st.permutations([*resident, *[-1] * 3]), label="slots")
    bounds = [first + sum(sizes[:unit]) for unit in range(num_units + 1)]
    # What stands behind the last unit means nothing.
    offsets = bounds + data.draw(st.lists(st.integers(0, 50), min_size=3 + len(sizes), max_size=3 + len(sizes)))
    rest = unattended_tokens(
        torch.tensor([[slots]]), torch.tensor([[offsets]]), torch.tensor([[num_units]]), len(sizes) + 1
    )
    expected = [len(set(range(*bounds[unit : unit + 2])) - resident) for unit in range(num_units)]

    assert rest.tolist() == [[expected + [0] * (len(sizes) + 1 - num_units)]]
