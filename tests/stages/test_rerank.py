"""SketchRerank: both passes by plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvframe
from kvframe import SketchRerank, StepInputs, UnitTable
from kvframe.errors import ConfigError
from kvframe.memory.index import channel_sizes
from kvframe.testing.cases import make_layout
from kvframe_kernels.key_sketch import Sketch, decode_sketch

LAYOUT = make_layout(batch_size=1, num_kv_heads=1, group_size=2, head_dim=5)
FIRST = 3  # the row of the first unit's first token


def expected(
    selector: SketchRerank,
    scores: list[float],
    sizes: list[int],
    queries: list[list[float]],
    approximate: list[list[float]],
) -> list[int]:
    """Rows that are selected, in no order. approximate: the key that the sketch gives for each token."""
    starts = [FIRST + sum(sizes[:unit]) for unit in range(len(sizes))]
    by_score = sorted(range(len(sizes)), key=lambda unit: (-scores[unit], unit))
    candidates = [row for unit in by_score for row in range(starts[unit], starts[unit] + sizes[unit])]
    candidates = sorted(candidates[: selector.oversample * selector.token_budget])
    shares = dict.fromkeys(candidates, 0.0)
    for query in queries:
        products = {
            row: LAYOUT.sm_scale * math.fsum(x * y for x, y in zip(query, approximate[row - FIRST], strict=True))
            for row in candidates
        }
        highest = max(products.values(), default=0.0)
        weights = {row: math.exp(product - highest) for row, product in products.items()}
        total = math.fsum(weights.values())
        for row, weight in weights.items():
            shares[row] += weight / total / len(queries)
    size = selector.run_length
    runs = [candidates[start : start + size] for start in range(0, len(candidates), size)]
    runs.sort(key=lambda run: -math.fsum(shares[row] for row in run))
    return [row for run in runs for row in run][: selector.token_budget]


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    token_budget=st.integers(1, 12),
    oversample=st.integers(1, 4),
    bits=st.sampled_from([2, 4, 8]),
    run_length=st.integers(1, 4),
    scales=st.sampled_from(["token", "channel"]),
    seed=st.integers(0, 2**16),
)
def test_two_passes(
    sizes: list[int], token_budget: int, oversample: int, bits: int, run_length: int, scales: str, seed: int
):
    """Units by score up to a multiple of the budget; then runs of their tokens by what a softmax over these candidates
    gives them, with keys from the sketch; the last run is cut to fit."""
    selector = SketchRerank(
        token_budget=token_budget, oversample=oversample, bits=bits, run_length=run_length, scales=scales
    )
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_units, width = sum(sizes), len(sizes), LAYOUT.head_dim
    keys = torch.randn(1, num_tokens, width, generator=generator, dtype=torch.float64)
    query = torch.randn(1, 2, width, generator=generator, dtype=torch.float64)
    scores = torch.rand(1, 1, num_units, generator=generator, dtype=torch.float64)
    unit = torch.arange(num_units).repeat_interleave(torch.tensor(sizes))
    means = torch.stack([keys[0, unit == number].mean(0) for number in range(num_units)])
    channels = torch.rand(1, width, generator=generator, dtype=torch.float64) + 0.1 if scales == "channel" else None
    sketch = selector.row_index(keys, keys, means[unit][None], channels)
    # A column more than there are units or rows, with what means nothing.
    units = UnitTable(
        offsets=torch.tensor([[[FIRST, *(FIRST + sum(sizes[: n + 1]) for n in range(num_units)), 0]]]),
        num_units=torch.tensor([[num_units]]),
        max_units=num_units + 1,
        means=(torch.nn.functional.pad(means, (0, 0, 0, 1), value=99.0)[None, None],) * 2,
        row_index={
            name: torch.nn.functional.pad(part, (0, 0, FIRST, 2), value=9)[:, None] for name, part in sketch.items()
        },
        channels=None if channels is None else channels[None],
    )
    inputs = StepInputs(query=query, layout=LAYOUT)
    rows, count = selector.select(inputs, torch.nn.functional.pad(scores, (0, 1), value=-math.inf), units)
    decoded = decode_sketch(Sketch.of(sketch), bits, width)[0]
    approximate = means[unit] + (decoded if channels is None else decoded * channels)
    wanted = expected(selector, scores[0, 0].tolist(), sizes, query[0].tolist(), approximate.tolist())

    assert rows.shape == (1, 1, token_budget) and count.tolist() == [[min(token_budget, num_tokens)]]
    assert sorted(rows[0, 0, : len(wanted)].tolist()) == sorted(wanted) and len(wanted) == int(count)
    assert (rows[0, 0, len(wanted) :] == -1).all()


def products_off(selector: SketchRerank, keys: torch.Tensor, query: torch.Tensor) -> float:
    """Root mean square of what is missed of q . k by a sketch of the keys [T, D], with queries [n, D]."""
    channels = channel_sizes(keys[None]) if selector.scales_channels else None
    sketch = selector.row_index(keys[None], keys[None], torch.zeros_like(keys)[None], channels)
    decoded = decode_sketch(Sketch.of(sketch), selector.bits, keys.shape[-1])[0]
    decoded = decoded if channels is None else decoded * channels
    return float((query @ (decoded - keys).T).square().mean().sqrt())


@pytest.mark.parametrize("bits", [2, 4, 8])
@given(outlier=st.floats(8, 64), place=st.integers(0, 31), seed=st.integers(0, 2**16))
def test_large_channels(bits: int, outlier: float, place: int, seed: int):
    """Where one channel of all keys is many times as large as the others, sizes of channels make the sketch's products
    at least twice as exact, for queries that do not lie in that channel alone: its step is the channel's own."""
    generator = torch.Generator().manual_seed(seed)
    keys, query = torch.randn(2, 200, 32, generator=generator, dtype=torch.float64)
    keys[:, place] *= outlier
    query[:, place] /= outlier
    by_token, by_channel = (products_off(SketchRerank(bits=bits, scales=s), keys, query) for s in ("token", "channel"))

    assert by_channel < by_token / 2


def test_the_sketch_decides_within_a_unit():
    """Of two tokens of the best unit the one that the query fits is taken."""
    policy = kvframe.policy(
        "louiskv", sink_size=0, window_size=1, token_budget=2, cluster_size=2, dense_layers=()
    ).swap(
        trigger=kvframe.EveryStep(),
        units=kvframe.PageUnits(page_size=2),
        scorer=kvframe.MeanKey(keep_values=True),
        selector=SketchRerank(token_budget=2, oversample=2),
    )
    layout = make_layout(batch_size=1, num_kv_heads=1, group_size=1, head_dim=2, sm_scale=1.0)
    layer = kvframe.runtime.RetrievalLayer(layout, policy, 8, "offload")
    keys = torch.tensor([[5.0, 0], [-3, 0], [4, 0], [-2.5, 0], [0, 1]], dtype=torch.float64)[None, None]
    layer.prompt(keys, keys, keys, [5], 5)
    layer.decode(*(torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64) for _ in range(3)))

    assert layer.attended_positions(0, 0).tolist() == [0, 2, 4, 5]


@pytest.mark.parametrize("options, name", [({"bits": 3}, "bits"), ({"oversample": 0}, "oversample")])
def test_options_that_are_none(options: dict[str, int], name: str):
    """Codes fill a byte, and there are candidates for the whole budget."""
    with pytest.raises(
        ConfigError, match=rf"SketchRerank\.{name} must be .*, got|SketchRerank\.{name} must be .*; got"
    ):
        SketchRerank(**options)


def test_a_scorer_without_means():
    """The sketch is of the difference to a mean key that the scorer keeps."""
    with pytest.raises(ConfigError, match=r"SketchRerank works with mean keys.*MeanKey\(keep_values=True\)"):
        kvframe.policy("louiskv").swap(selector=SketchRerank())
