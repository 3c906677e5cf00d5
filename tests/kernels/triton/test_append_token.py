"""The kernel of `append_token` against its reference, over runs of steps."""

import torch
from guard import Guard, guarded
from hypothesis import given, settings
from hypothesis import strategies as st

from kvframe_kernels.append_token import LENGTH, NUM_COUNTS, Slots, append_token


def make_state(guard: Guard, heads: tuple[int, int], sizes: dict[str, int], width: int, dtype: torch.dtype) -> tuple:
    """An empty ledger and empty slots; keys and values of empty slots are NaN."""
    num_slots = sizes["sink"] + sizes["capacity"] + sizes["window"] + sizes["max"]
    slots = Slots(
        keys=guard.poisoned(*heads, num_slots, width, dtype=dtype),
        values=guard.poisoned(*heads, num_slots, 2 * width, dtype=dtype),
        bias=guard.empty(*heads, num_slots, dtype=dtype).fill_(-torch.inf),
        resident_rows=guard.empty(*heads, sizes["capacity"], dtype=torch.int64).fill_(-1),
        sink_size=sizes["sink"],
    )
    counts = guard.empty(NUM_COUNTS, *heads, dtype=torch.int64).zero_()
    offsets = guard.empty(*heads, sizes["max_units"] + 2, dtype=torch.int64).zero_()
    offsets[..., 0] = sizes["sink"]
    return counts, offsets, slots, guard.empty(*heads, dtype=torch.bool).fill_(True)


@settings(max_examples=8)
@given(
    heads=st.sampled_from([(1, 1), (2, 3)]), sink=st.integers(0, 3), window=st.integers(1, 6),
    max_size=st.integers(1, 5), capacity=st.sampled_from([0, 3, 70]), width=st.sampled_from([16, 48]),
    dtype=st.sampled_from([torch.float16, torch.float32]), seed=st.integers(0, 99),
)  # fmt: skip
def test_equals_reference(
    device: torch.device, heads: tuple[int, int], sink: int, window: int, max_size: int, capacity: int, width: int,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    """Ledger, slots and what left are bit for bit those of the reference, step after step."""
    generator = torch.Generator().manual_seed(seed)
    num_steps = 24
    sizes = {"sink": sink, "capacity": capacity, "window": window, "max": max_size, "max_units": num_steps + 1}
    options = {"window_size": window, "min_size": min(2, max_size), "max_size": max_size}
    with guarded(device) as guard:
        ours, theirs = (make_state(guard, heads, sizes, width, dtype) for _ in range(2))
        for step in range(num_steps):
            cut = (torch.rand(heads, generator=generator) < 0.4).to(device) if seed % 3 else None
            keys = torch.randn(*heads, 2, width, generator=generator).to(device, dtype)[:, :, 0]
            values = torch.randn(*heads, 2 * width, generator=generator).to(device, dtype)
            if step == num_steps - 2:
                values[0, 0, 3] = torch.inf
            results = [
                append_token(counts, offsets, cut, keys, values, slots, finite, **options, backend=backend)
                for (counts, offsets, slots, finite), backend in ((ours, "triton"), (theirs, "reference"))
            ]
            mine, expected = results
            assert torch.equal(mine.leaves, expected.leaves) and torch.equal(mine.position, expected.position)
            for name in ("column", "start", "size"):
                left = getattr(mine, name) * mine.leaves
                assert torch.equal(left, getattr(expected, name) * mine.leaves), name
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
            assert torch.equal(ours[2].resident_rows, theirs[2].resident_rows)
            assert torch.equal(ours[2].bias, theirs[2].bias)
            for name in ("keys", "values"):
                torch.testing.assert_close(
                    getattr(ours[2], name), getattr(theirs[2], name), rtol=0, atol=0, equal_nan=True
                )
        assert int(ours[0][LENGTH].min()) == num_steps
        assert torch.equal(ours[3], theirs[3]) and not ours[3][0, 0]


def test_a_full_ledger_writes_no_further(device: torch.device) -> None:
    """More units than there is room for: nothing is written outside the offsets."""
    sizes = {"sink": 0, "capacity": 4, "window": 1, "max": 1, "max_units": 3}
    with guarded(device) as guard:
        counts, offsets, slots, finite = make_state(guard, (1, 2), sizes, 16, torch.float32)
        token = torch.ones(1, 2, 16, device=device), torch.ones(1, 2, 32, device=device)
        for _ in range(9):
            append_token(
                counts, offsets, None, *token, slots, finite,
                window_size=1, min_size=1, max_size=1, backend="triton",
            )  # fmt: skip
