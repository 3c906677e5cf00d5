"""Unit builders: what all of them keep, and the sizes of each."""

from typing import Any

import pytest
import torch
from helpers import stage_id, step_inputs, unit_lists
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvframe import Decision, DecoupledUnits, EveryStep, PageUnits, StepInputs, TokenUnits, UnitBuilder
from kvframe.errors import ConfigError, SlotError
from kvframe.stages.units import build_runs
from kvframe.testing.cases import make_layout
from kvframe.testing.small import small_stages
from kvframe.testing.strategies import stages


def random_keys(num_heads: int, num_tokens: int, seed: int) -> Tensor:
    """[N, T, 6]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_heads, num_tokens, 6, generator=generator, dtype=torch.float64)


@given(
    builder=stages("units"),
    num_heads=st.integers(1, 3),
    num_tokens=st.integers(1, 70) | st.just(111),
    seed=st.integers(0, 2**16),
)
def test_prompt_units_are_a_disjoint_cover(builder: UnitBuilder, num_heads: int, num_tokens: int, seed: int):
    """Every builder puts every token of every head into exactly one unit, the same way each time."""
    keys = random_keys(num_heads, num_tokens, seed)
    units, again = builder.build(keys), builder.build(keys.clone())

    assert units.order.shape == (num_heads, num_tokens) and units.order.dtype == units.sizes.dtype == torch.int64
    for head in range(num_heads):
        count = int(units.num_units[head])
        assert (units.sizes[head, :count] > 0).all() and (units.sizes[head, count:] == 0).all()
        assert int(units.sizes[head].sum()) == num_tokens
        assert sorted(units.order[head].tolist()) == list(range(num_tokens))
    assert torch.equal(units.order, again.order) and torch.equal(units.sizes, again.sizes)
    assert torch.equal(units.num_units, again.num_units)


@given(builder=stages("units"), num_tokens=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_heads_are_cut_on_their_own(builder: UnitBuilder, num_tokens: int, seed: int):
    """A head's units do not depend on the heads beside it."""
    keys = random_keys(3, num_tokens, seed)
    together = builder.build(keys)

    assert [unit_lists(together, head) for head in range(3)] == [
        unit_lists(builder.build(keys[head : head + 1]), 0) for head in range(3)
    ]


@given(builder=stages("units"))
def test_bounds_of_output_units(builder: UnitBuilder):
    """A unit that is closed at a boundary is no larger than one that is closed because it is full."""
    assert 1 <= builder.min_size <= builder.max_size
    assert 1 <= builder.unit_size


@pytest.mark.parametrize("builder", small_stages("units"), ids=stage_id)
def test_boundary_has_a_flag_for_every_head(builder: UnitBuilder):
    """Or is None, where no boundary depends on data."""
    layout = make_layout(batch_size=3, num_kv_heads=2)
    trigger = EveryStep()
    inputs = step_inputs(layout)
    boundary = builder.boundary(inputs, trigger.step(inputs, trigger.init(layout)), builder.init(layout))

    assert boundary is None or (boundary.shape == (3, 2) and boundary.dtype == torch.bool)


@given(num_tokens=st.integers(1, 111), size=st.integers(1, 120))
def test_runs(num_tokens: int, size: int):
    """Runs are consecutive, of the size asked for but for the last."""
    units = build_runs(torch.zeros(2, num_tokens, 1), size)
    expected = [list(range(num_tokens))[start : start + size] for start in range(0, num_tokens, size)]

    assert [unit_lists(units, head) for head in range(2)] == [expected, expected]


@given(num_tokens=st.integers(1, 63), page_size=st.integers(1, 20))
def test_pages_and_tokens(num_tokens: int, page_size: int):
    """Pages are runs of their size, in the prompt as behind it; tokens are pages of one."""
    keys, pages = torch.zeros(1, num_tokens, 2), PageUnits(page_size=page_size)
    sizes = [len(unit) for unit in unit_lists(pages.build(keys), 0)]

    assert sizes[:-1] == [page_size] * (len(sizes) - 1) and sum(sizes) == num_tokens
    assert pages.unit_size == pages.min_size == pages.max_size == page_size
    assert unit_lists(TokenUnits().build(keys), 0) == [[token] for token in range(num_tokens)]
    assert TokenUnits().unit_size == TokenUnits().min_size == TokenUnits().max_size == 1


class Marked(PageUnits):
    """Pages whose output side can be told from others."""

    def init(self, layout: Any) -> str:
        return "state"

    def boundary(self, inputs: StepInputs, decision: Decision, state: Any) -> Tensor | None:
        assert state == "state"
        return ~decision.due


def test_decoupled_units():
    """The prompt is cut by one builder; everything behind it follows the other."""
    units = DecoupledUnits(prompt=PageUnits(page_size=7), output=Marked(page_size=3))
    layout = make_layout()
    due = torch.tensor([[True, False], [False, False]])
    inputs = StepInputs(query=torch.ones(2, 4, 8), layout=layout)
    boundary = units.boundary(inputs, Decision(due=due), units.init(layout))

    assert [len(unit) for unit in unit_lists(units.build(torch.zeros(1, 15, 2)), 0)] == [7, 7, 1]
    assert (units.unit_size, units.min_size, units.max_size) == (7, 3, 3)
    assert boundary is not None and torch.equal(boundary, ~due)


@pytest.mark.parametrize("page_size", [0, -4, 2.0, "16", False])
def test_page_size_that_is_none(page_size: object):
    """A page has at least one token."""
    with pytest.raises(ConfigError, match=r"PageUnits\.page_size must be an integer >= 1, got"):
        PageUnits(page_size=page_size)


@pytest.mark.parametrize("side", ["prompt", "output"])
@pytest.mark.parametrize("value", [None, "pages", EveryStep(), PageUnits])
def test_decoupled_takes_unit_builders(side: str, value: object):
    """A stage of another slot, a class or a name is refused with the side it was given for."""
    sides = {"prompt": TokenUnits(), "output": TokenUnits(), side: value}
    with pytest.raises(SlotError, match=rf"DecoupledUnits\.{side} must be a UnitBuilder, got"):
        DecoupledUnits(**sides)
