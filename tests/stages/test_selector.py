"""Selectors: rows within the capacity."""

import math

import pytest
import torch
from helpers import stage_id

from kvframe import SelectNothing, Selector, StepInputs, TopBudget, UnitTable
from kvframe.errors import ConfigError
from kvframe.testing.cases import make_layout
from kvframe.testing.small import small_stages

# A selector that goes by the scores does not look at the query.
INPUTS = StepInputs(query=torch.zeros(2, 6, 8), layout=make_layout(num_kv_heads=3))


def random_units(num_units: list[list[int]]) -> tuple[StepInputs, torch.Tensor, UnitTable]:
    """Scores [B, H, U] of units of one to six tokens, from row 2 on."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor(num_units)
    width = int(counts.max())
    scores = torch.rand(*counts.shape, width, generator=generator)
    scores = scores.masked_fill(torch.arange(width) >= counts[..., None], -math.inf)
    sizes = torch.randint(1, 7, (*counts.shape, width), generator=generator)
    offsets = torch.cat([torch.full((*counts.shape, 1), 2), 2 + sizes.cumsum(-1)], -1)
    return INPUTS, scores, UnitTable(offsets=offsets, num_units=counts, max_units=width)


@pytest.mark.parametrize("selector", small_stages("selector"), ids=stage_id)
def test_every_selector_keeps_its_capacity(selector: Selector):
    """No head gets more rows than there are slots, a row twice, or a row of no unit."""
    num_units = [[9, 1, 0], [4, 9, 2]]
    inputs, scores, units = random_units(num_units)
    rows, count = selector.select(inputs, scores, units)

    assert rows.shape == (2, 3, selector.capacity_in(inputs.layout)) and count.shape == (2, 3)
    for batch in range(2):
        for head in range(3):
            taken = rows[batch, head, : int(count[batch, head])].tolist()
            last = int(units.offsets[batch, head, num_units[batch][head]])
            assert len(set(taken)) == len(taken) and all(2 <= row < last for row in taken)
            assert (rows[batch, head, len(taken) :] == -1).all()


def test_top_budget_takes_the_best_units():
    """Whole units by score; the last one is cut so that the budget is met."""
    scores = torch.tensor([[[0.1, 0.9, 0.5, 0.9]]])
    offsets = torch.tensor([[[4, 6, 9, 14, 16]]])
    units = UnitTable(offsets=offsets, num_units=torch.tensor([[4]]), max_units=4)
    rows, count = TopBudget(token_budget=8).select(INPUTS, scores, units)

    assert rows.tolist() == [[[6, 7, 8, 14, 15, 9, 10, 11]]] and count.tolist() == [[8]]


def test_nothing():
    """No rows, and no slots for any."""
    rows, count = SelectNothing().select(*random_units([[3, 2]]))

    assert SelectNothing().capacity == 0
    assert rows.shape == (1, 2, 0) and count.tolist() == [[0, 0]]


@pytest.mark.parametrize("token_budget", [0, -1, 10.0, "512", True])
def test_budget_that_is_none(token_budget: object):
    """A budget is a whole number of at least one token."""
    with pytest.raises(ConfigError, match=r"TopBudget\.token_budget must be an integer >= 1, got"):
        TopBudget(token_budget=token_budget)
