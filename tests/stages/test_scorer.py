"""Scorers: an index entry a unit, and a score a unit."""

import math

import pytest
import torch
from attrs import evolve
from helpers import stage_id, step_inputs
from hypothesis import given
from hypothesis import strategies as st

from kvframe import MeanKey, Scorer, StepInputs
from kvframe.errors import ConfigError
from kvframe.testing.cases import make_layout, unit_table
from kvframe.testing.small import small_stages


@pytest.mark.parametrize("scorer", small_stages("scorer"), ids=stage_id)
def test_index_of_units_apart(scorer: Scorer):
    """A unit's entry depends on its own tokens alone, and has the same names and shapes however many units there
    are."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 20, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    unit_ids = torch.randint(0, 5, (3, 20), generator=generator)  # 4 stands for tokens of no unit
    together = scorer.index(keys, values, unit_ids, 4)
    for head in range(3):
        for unit in range(4):
            own = unit_ids[head] == unit
            alone = scorer.index(
                keys[head : head + 1, own], values[head : head + 1, own], torch.zeros(1, int(own.sum()), dtype=int), 1
            )
            assert alone.keys() == together.keys()
            for name, entry in alone.items():
                torch.testing.assert_close(together[name][head, unit], entry[0, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("scorer", small_stages("scorer"), ids=stage_id)
def test_units_that_do_not_exist(scorer: Scorer):
    """They have no score, and what lies in their place changes no other score."""
    sources = scorer.sources
    layout = make_layout(batch_size=2, num_kv_heads=2, head_dim=8, layer_idx=max(sources, default=0) + 1)
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(4, 12, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    entries = scorer.index(keys, values, torch.arange(12).expand(4, -1) // 2, 6)
    index = {name: entry.view(2, 2, *entry.shape[1:]) for name, entry in entries.items()}
    num_units = torch.tensor([[6, 0], [1, 4]])
    inputs = step_inputs(
        layout,
        query=torch.randn(2, 4, 8, generator=generator, dtype=torch.float64),
        state=scorer.init(layout),
        notes=torch.rand(scorer.num_notes, 2, 2, 14, generator=generator),
    )
    for source in sources:
        lengths = torch.full((2,), 14)
        earlier = torch.randn(2, 2, 14, 8, generator=generator, dtype=torch.float64)
        scorer.publish(inputs.query, earlier, lengths, evolve(layout, layer_idx=source), inputs.board)
    units = unit_table(torch.full((2, 2, 6), 2), num_units)
    scores = scorer.score(inputs, index, units)
    absent = torch.arange(6) >= num_units[..., None]
    for entry in index.values():
        entry[absent] = -100
    again = scorer.score(inputs, index, units)

    assert scores.shape == (2, 2, 6) and scores.dtype in (torch.float32, torch.float64)
    assert torch.equal(scores == -math.inf, absent)
    assert torch.equal(scores, again)


@given(seed=st.integers(0, 2**16), sm_scale=st.sampled_from([0.2, 1.0]))
def test_token_units_get_their_attention_weight(seed: int, sm_scale: float):
    """For units of one token the score is the softmax that full attention has, meaned over the group."""
    layout = make_layout(batch_size=1, num_kv_heads=2, group_size=3, head_dim=4, sm_scale=sm_scale)
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
    query = torch.randn(1, 6, 4, generator=generator, dtype=torch.float64)
    index = {"mean_key": MeanKey().index(keys, keys, torch.arange(9).expand(2, -1), 9)["mean_key"][None]}
    units = unit_table(torch.ones(1, 2, 9, dtype=int), torch.full((1, 2), 9))
    scores = MeanKey().score(StepInputs(query=query, layout=layout), index, units)
    weights = torch.stack([torch.softmax(sm_scale * keys[head // 3] @ query[0, head], 0) for head in range(6)])

    torch.testing.assert_close(scores[0], weights.view(2, 3, 9).mean(1), atol=1e-12, rtol=0)


def test_size_term_counts_a_unit_s_tokens():
    """A unit of n equal keys gets, with the size term, what its n tokens get as units of their own."""
    layout = make_layout(batch_size=1, num_kv_heads=1, group_size=2, head_dim=4)
    generator = torch.Generator().manual_seed(3)
    few = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    sizes = torch.tensor([[[5, 1, 2]]])
    inputs = StepInputs(query=torch.randn(1, 2, 4, generator=generator, dtype=torch.float64), layout=layout)
    whole = unit_table(sizes, torch.tensor([[3]]))
    units = MeanKey(size_term=True).score(inputs, {"mean_key": few[None]}, whole)
    tokens = few.repeat_interleave(sizes[0, 0], dim=1)
    single = unit_table(torch.ones(1, 1, 8, dtype=int), torch.tensor([[8]]))
    apart = MeanKey().score(inputs, {"mean_key": tokens[None]}, single)
    summed = torch.stack([part.sum() for part in apart[0, 0].split([5, 1, 2])])

    torch.testing.assert_close(units[0, 0], summed, atol=1e-12, rtol=0)


def test_reduction_over_the_group():
    """The largest of the heads' scores, or their mean."""
    layout = make_layout(batch_size=1, num_kv_heads=1, group_size=2, head_dim=2, sm_scale=1.0)
    index = {"mean_key": torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]], dtype=torch.float64)}
    inputs = StepInputs(query=torch.tensor([[[3.0, -1.0], [1.0, 5.0]]], dtype=torch.float64), layout=layout)

    def scores(**options: object) -> list[float]:
        scorer = MeanKey(softmax=False, **options)
        return scorer.score(inputs, index, unit_table(torch.ones(1, 1, 2, dtype=int), torch.tensor([[2]])))[
            0, 0
        ].tolist()

    assert scores(group_reduction="max") == [3.0, 5.0]
    assert scores(group_reduction="mean") == [2.0, 2.0]


@pytest.mark.parametrize(
    "options", [{"group_reduction": "sum"}, {"softmax": 1}, {"softmax": None}, {"size_term": "yes"}]
)
def test_options_that_are_none(options: dict[str, object]):
    """Anything but the choices is refused, and the choices are named."""
    (name,) = options
    with pytest.raises(ConfigError, match=rf"MeanKey\.{name} must be one of .*; got"):
        MeanKey(**options)
