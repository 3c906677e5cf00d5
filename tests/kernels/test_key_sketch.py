"""Keys in a few bits, and `sketch_scores` and `window_sketch`, against plain loops over Python numbers."""

import math

import pytest
import torch
from helpers import dot
from hypothesis import given
from hypothesis import strategies as st

from kvframe_kernels.dispatch import KernelError, is_interpreted
from kvframe_kernels.key_sketch import (
    Centres,
    Sketch,
    decode_sketch,
    encode_sketch,
    sketch_scores,
    window_sketch,
)
from kvframe_kernels.packing import packed_size

BITS = st.sampled_from([2, 4, 8])


def numbers(seed: int, *shape: int) -> torch.Tensor:
    """Some large, some small."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.randint(-2, 3, shape, generator=generator).double()
    return sizes * torch.randn(shape, generator=generator, dtype=torch.float64)


def nearest_level(number: float, largest: float, bits: int) -> float:
    """The nearest of 2^bits levels that lie evenly about 0, the outermost at `largest`."""
    levels = [largest * (2 * level / (2**bits - 1) - 1) for level in range(2**bits)]
    return min(levels, key=lambda level: abs(number - level))


@given(seed=st.integers(0, 2**16), bits=BITS, width=st.integers(1, 9), centred=st.booleans(), channelled=st.booleans())
def test_encoding(seed: int, bits: int, width: int, centred: bool, channelled: bool):
    """A number becomes the nearest level of its key, or of what the key differs by from a centre, channel by channel in
    its own size."""
    keys = numbers(seed, 2, 4, width)
    centres = numbers(seed + 1, 2, 4, width) if centred else None
    channels = numbers(seed + 2, 2, width).abs() + 0.1 if channelled else None
    sketch = encode_sketch(keys, bits, centres, channels)
    restored = decode_sketch(sketch, bits, width, channels)

    assert sketch.codes.shape == (2, 4, packed_size(width, bits)) and sketch.step.shape == (2, 4, 1)
    if centres is not None:
        keys = keys - centres
    if channels is not None:
        keys, restored = (part / channels[:, None] for part in (keys, restored))
    for key, came in zip(keys.view(8, -1).tolist(), restored.view(8, -1).tolist()):
        largest = max(abs(number) for number in key)
        for number, back in zip(key, came):
            nearest = nearest_level(number, largest, bits)
            assert abs(number - back) == pytest.approx(abs(number - nearest), abs=1e-12 * largest)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_encoding_in_the_dtype_of_a_model(dtype: torch.dtype, bits: int):
    """Half a step, and what the step's own dtype rounds off of all steps together."""
    keys, centres = numbers(0, 40, 32).clamp(-100, 100).to(dtype), numbers(1, 40, 32).clamp(-100, 100).to(dtype)
    sketch = encode_sketch(keys, bits, centres)
    wanted = keys.double() - centres.double()
    largest = wanted.abs().amax(-1, keepdim=True)
    bound = largest / (2**bits - 1) + torch.finfo(dtype).eps * largest

    assert sketch.step.dtype == dtype
    assert ((decode_sketch(sketch, bits, 32).double() - wanted).abs() <= bound).all()


def test_a_key_that_is_its_centre():
    """It differs by zero, and is zero again."""
    keys = torch.full((1, 3, 5), 2.5, dtype=torch.bfloat16)
    sketch = encode_sketch(keys, 4, keys)
    restored = decode_sketch(sketch, 4, 5)

    assert sketch.step.dtype == torch.bfloat16
    assert restored.dtype == torch.float32 and not restored.any()


def test_by_name():
    """Under a prefix, beside what others keep."""
    sketch = encode_sketch(numbers(0, 1, 3, 5), 4)
    tensors = {**sketch.named(), **encode_sketch(numbers(1, 1, 3, 5), 4).named("other ")}

    assert set(tensors) == {"codes", "step", "other codes", "other step"}
    assert all(one is other for one, other in zip(Sketch.of(tensors), sketch, strict=True))


@given(
    heads=st.sampled_from([(1, 1), (2, 1), (1, 3)]), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    num_places=st.integers(1, 9), bits=BITS, width=st.integers(1, 6), centred=st.booleans(),
    skipped=st.booleans(), channelled=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_sketch_scores(
    heads: tuple[int, int], sizes: list[int], num_places: int, bits: int, width: int, centred: bool, skipped: bool,
    channelled: bool, seed: int,
) -> None:  # fmt: skip
    """Softmax over the candidates for every query head, with what sketch and centre stand for, then the mean over a
    group; rows in any order, what is behind the count, and heads that are not due, may hold anything."""
    num_kv_heads, group_size = heads
    generator = torch.Generator().manual_seed(seed)
    first, num_rows, num_units = 2, 2 + sum(sizes), len(sizes)
    shape = (2, num_kv_heads)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(2, num_kv_heads, *shape, generator=generator, dtype=torch.float64)

    channels = randn(width).abs() + 0.1 if channelled else None
    sketch = encode_sketch(randn(num_rows + 1, width), bits, channels=channels)
    means = randn(num_units + 1, width)
    means[:, :, num_units:] = math.nan
    offsets = torch.tensor([first + sum(sizes[:unit]) for unit in range(num_units + 1)] + [1]).expand(*shape, -1)
    drawn = torch.rand(*shape, sum(sizes), generator=generator).argsort(-1) + first
    rows = torch.nn.functional.pad(drawn[..., :num_places], (0, max(0, num_places - sum(sizes))), value=-9)
    count = torch.randint(0, min(num_places, sum(sizes)) + 1, shape, generator=generator)
    rows = torch.where(torch.arange(num_places) < count[..., None], rows, -7)
    due = torch.rand(shape, generator=generator) < 0.6 if skipped else None
    if due is not None:
        rows, count = rows.masked_fill(~due[..., None], 1 << 40), count.masked_fill(~due, 1 << 20)
    query = torch.randn(2, num_kv_heads * group_size, width, generator=generator, dtype=torch.float64)
    unit_ids = torch.searchsorted(offsets[0, 0, :num_units].contiguous(), rows, right=True) - 1
    places = torch.arange(num_places) < (count if due is None else count.masked_fill(~due, 0))[..., None]
    centres = Centres(means, torch.where(places, unit_ids, 1 << 30)) if centred else None
    scores = sketch_scores(query, rows, count, sketch, bits, 0.7, channels=channels, centres=centres, due=due)
    approximate = decode_sketch(sketch, bits, width, channels)

    assert scores.shape == rows.shape and scores.dtype == torch.float64
    for batch in range(2):
        for head in range(num_kv_heads):
            if due is not None and not due[batch, head]:
                continue
            number = int(count[batch, head])
            shares = [0.0] * number
            for member in range(group_size):
                products = []
                for row in rows[batch, head, :number].tolist():
                    key = approximate[batch, head, row]
                    if centred:
                        key = key + means[batch, head, sum(row >= bound for bound in offsets[0, 0, 1:-1].tolist())]
                    products.append(0.7 * dot(query[batch, head * group_size + member].tolist(), key.tolist()))
                weights = [math.exp(product - max(products)) for product in products]
                shares = [share + weight / sum(weights) / group_size for share, weight in zip(shares, weights)]
            assert scores[batch, head, :number].tolist() == pytest.approx(shares, abs=1e-12)
            assert (scores[batch, head, number:] == -math.inf).all()


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 7)), ring_size=st.integers(1, 9),
    first=st.integers(0, 2), num_rows=st.integers(1, 12), bits=BITS, centred=st.booleans(),
    channelled=st.booleans(), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_window_sketch(
    shape: tuple[int, int, int], ring_size: int, first: int, num_rows: int, bits: int, centred: bool,
    channelled: bool, seed: int,
) -> None:  # fmt: skip
    """Keys of the leaving unit, wherever the ring wraps, as `encode_sketch` makes them; all else stays."""
    *heads, width = shape
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(*heads, first + ring_size, width, generator=generator, dtype=torch.float64)
    before = encode_sketch(torch.randn(*heads, num_rows, width, generator=generator, dtype=torch.float64), bits)
    sketch = Sketch(*(part.clone() for part in before))
    leaves = torch.rand(heads, generator=generator) < 0.7
    start = torch.randint(0, num_rows + 2, heads, generator=generator)
    size = torch.randint(1, ring_size + 1, heads, generator=generator)
    channels = None
    if channelled:
        channels = torch.rand(*heads, width, generator=generator, dtype=torch.float64) + 0.1
    window_sketch(sketch, bits, leaves, start, size, buffer, first, ring_size, centred=centred, channels=channels)

    expected = Sketch(*(part.clone() for part in before))
    for batch, head in leaves.nonzero().tolist():
        low = int(start[batch, head])
        rows = range(low, low + int(size[batch, head]))
        keys = torch.stack([buffer[batch, head, first + row % ring_size] for row in rows])
        centre = keys.mean(0, keepdim=True).expand_as(keys) if centred else None
        codes, step = encode_sketch(keys, bits, centre, None if channels is None else channels[batch, head])
        for place, row in enumerate(rows):
            if row < num_rows:
                expected.codes[batch, head, row], expected.step[batch, head, row] = codes[place], step[place]
    torch.testing.assert_close(sketch.step, expected.step, atol=1e-12, rtol=1e-12)
    restored, wanted = decode_sketch(sketch, bits, width), decode_sketch(expected, bits, width)
    torch.testing.assert_close(restored, wanted, atol=1e-12, rtol=1e-12)


def test_backend():
    """A kernel that cannot run here is an error, and says why."""
    keys = torch.randn(1, 1, 5, 16)
    sketch, rows, count = encode_sketch(keys, 4), torch.zeros(1, 1, 2, dtype=torch.int64), torch.ones(1, 1)
    arguments = (keys[:, :, 0].expand(1, 2, 16), rows, count, sketch, 4, 1.0)
    if not is_interpreted():
        with pytest.raises(KernelError, match="its tensors lie on the CPU"):
            sketch_scores(*arguments, backend="triton")
