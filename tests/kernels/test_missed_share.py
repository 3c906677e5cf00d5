"""`kept_lse` and `missed_share` against their definitions, in Python numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvframe_kernels.append_token import Slots
from kvframe_kernels.missed_share import exceeds, kept_lse, missed_share


@given(
    resident=st.sets(st.integers(0, 20), max_size=8),
    candidates=st.dictionaries(st.integers(0, 20), st.floats(0, 1), max_size=10),
    num_behind=st.integers(0, 3),
)
def test_missed_share(resident: set[int], candidates: dict[int, float], num_behind: int):
    """The largest share of a candidate that is not resident; what stands behind the last candidate means nothing."""
    rows = torch.tensor([[[*candidates, *[10**6] * num_behind]]], dtype=torch.int64)
    shares = torch.tensor([[[*candidates.values(), *[99.0] * num_behind]]], dtype=torch.float64)
    if rows.shape[-1] == 0:
        return
    held, count = torch.tensor([[[-1, *resident, -1]]]), torch.tensor([[len(candidates)]])
    missed = missed_share(held, rows, count, shares, torch.zeros(1, 1, 1, dtype=torch.int32), 21)

    assert missed.tolist() == [[max((share for row, share in candidates.items() if row not in resident), default=0.0)]]


@given(
    num_sinks=st.integers(0, 3), capacity=st.integers(0, 3), ring_size=st.integers(1, 4), seed=st.integers(0, 2**16),
    data=st.data(),
)  # fmt: skip
def test_kept_lse(num_sinks: int, capacity: int, ring_size: int, seed: int, data: st.DataObject):
    """log of the sum of exp over sinks and window, not over resident rows, nor over slots that are empty."""
    num_slots = num_sinks + capacity + ring_size
    filled = data.draw(st.lists(st.booleans(), min_size=num_slots, max_size=num_slots), label="filled")
    filled[-1] = True
    generator = torch.Generator().manual_seed(seed)
    query, keys = (torch.randn(1, size, 4, generator=generator, dtype=torch.float64) for size in (2, num_slots))
    bias = torch.tensor([0.0 if one else -math.inf for one in filled], dtype=torch.float64)[None, None]
    slots = Slots(keys[None], keys[None], bias, torch.zeros(1, 1, capacity, dtype=torch.int64), num_sinks)
    kept = [slot for slot in range(num_slots) if filled[slot] and not num_sinks <= slot < num_sinks + capacity]
    expected = [
        math.log(sum(math.exp(0.3 * float(query[0, head] @ keys[0, slot])) for slot in kept)) for head in range(2)
    ]

    assert kept_lse(query, slots, 0.3)[0].tolist() == pytest.approx(expected, abs=1e-12)


@given(
    missed=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5]), min_size=1, max_size=5), share=st.sampled_from([0.0, 0.25]),
    data=st.data(),
)  # fmt: skip
def test_exceeds(missed: list[float], share: float, data: st.DataObject):
    """Strictly more than the share, or the first step, which then is over."""
    flags = data.draw(st.lists(st.booleans(), min_size=len(missed), max_size=len(missed)), label="first")
    first = torch.tensor([flags])
    found = exceeds(torch.tensor([missed]), share, first)

    assert found.tolist() == [[one > share or flag for one, flag in zip(missed, flags, strict=True)]]
    assert not first.any()
