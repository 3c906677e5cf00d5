"""Numbers in a few bits, against plain loops over Python numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kvframe.quantization import restore, round_groups
from kvframe_kernels.packing import pack, packed_size, unpack

BITS = st.sampled_from([2, 4, 8])


def numbers(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float = 1.0) -> torch.Tensor:
    """Some large, some small."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.randint(-2, 3, shape, generator=generator).double()
    return (scale * sizes * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def codes_of(bits: int) -> SearchStrategy[list[list[int]]]:
    """Rows of one length, each number of so many bits."""
    code = st.integers(0, 2**bits - 1)
    return st.integers(0, 11).flatmap(
        lambda width: st.lists(st.lists(code, min_size=width, max_size=width), min_size=1, max_size=3)
    )


@given(data=st.data(), bits=BITS)
def test_packing(data: st.DataObject, bits: int):
    """A row of codes is one number, the first code in its lowest bits, byte by byte; unpacking gives it back."""
    rows = data.draw(codes_of(bits))
    codes = torch.tensor(rows, dtype=torch.uint8).view(len(rows), len(rows[0]))
    packed = pack(codes, bits)

    assert packed.dtype == torch.uint8 and packed.shape == (len(rows), packed_size(len(rows[0]), bits))
    for row, own in zip(packed.tolist(), rows):
        number = sum(code << bits * place for place, code in enumerate(own))
        assert row == list(number.to_bytes(len(row), "little"))
    assert torch.equal(unpack(packed, bits, len(rows[0])), codes)


@given(seed=st.integers(0, 2**16), bits=BITS, width=st.integers(1, 12))
def test_rounding(seed: int, bits: int, width: int):
    """Each number becomes the nearest of 2^bits levels, evenly from the smallest to the largest of its group."""
    given_numbers = numbers(seed, (2, 3, width))
    rounded = round_groups(given_numbers, bits)
    restored = rounded.restore()

    assert rounded.codes.dtype == torch.uint8 and rounded.step.shape == rounded.least.shape == (2, 3, 1)
    for group, came in zip(given_numbers.view(6, -1).tolist(), restored.view(6, -1).tolist()):
        low, high = min(group), max(group)
        levels = [low + level * (high - low) / (2**bits - 1) for level in range(2**bits)]
        for number, back in zip(group, came):
            nearest = min(abs(number - level) for level in levels)
            assert abs(number - back) == pytest.approx(nearest, abs=1e-12 * max(abs(low), abs(high), 1e-300))
            assert min(abs(back - level) for level in levels) <= 1e-12 * max(abs(low), abs(high), 1e-300)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_in_the_dtype_of_a_model(dtype: torch.dtype, bits: int):
    """Half a step, and what the numbers' own dtype rounds off the step and the result."""
    given_numbers = numbers(0, (50, 32), dtype)
    rounded = round_groups(given_numbers, bits)
    restored = rounded.restore()
    least, most = given_numbers.double().aminmax(dim=-1, keepdim=True)
    step, eps = (most - least) / (2**bits - 1), torch.finfo(dtype).eps
    bound = step / 2 + eps * (most - least) + eps * given_numbers.double().abs().amax(-1, keepdim=True)

    assert restored.dtype == rounded.step.dtype == rounded.least.dtype == dtype
    assert ((restored.double() - given_numbers.double()).abs() <= bound).all()


def test_a_group_of_one_value():
    """It comes back exactly, whatever its codes are."""
    rounded = round_groups(torch.full((2, 5), -3.7, dtype=torch.bfloat16), 2)

    assert torch.equal(rounded.restore(), torch.full((2, 5), -3.7, dtype=torch.bfloat16))
    assert not rounded.step.any()


def test_a_range_that_float16_does_not_hold():
    """The difference of a group's largest and smallest may overflow; its step does not."""
    rounded = round_groups(torch.tensor([-60000.0, 0.0, 60000.0], dtype=torch.float16), 2)

    assert rounded.restore().isfinite().all() and rounded.codes.tolist()[::2] == [0, 3]


def test_restoring_broadcasts():
    """Codes of rows and the step of each channel."""
    codes = torch.tensor([[0, 1], [3, 2]], dtype=torch.uint8)
    step, least = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, -1.0]])

    assert restore(codes, step, least).tolist() == [[1.0, 1.0], [2.5, 3.0]]
