"""Selectors: rows within the capacity."""

import math

import pytest
import torch
from attrs import evolve
from helpers import stage_id, step_inputs
from hypothesis import given
from hypothesis import strategies as st

from kvframe import (
    EveryStep,
    HostPool,
    QuantizedHostPool,
    Selection,
    SelectNothing,
    Selector,
    TokenUnits,
    TopBudget,
    TopBytes,
    UnitTable,
)
from kvframe import policy as policy_of
from kvframe.errors import ConfigError
from kvframe.testing.cases import Case, Turn, make_layout, play
from kvframe.testing.small import small_stages

INPUTS = step_inputs(make_layout(num_kv_heads=3))


def random_units(num_units: list[list[int]]) -> tuple[torch.Tensor, UnitTable]:
    """Scores [B, H, U] of units of one to six tokens, from row 2 on."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor(num_units)
    width = int(counts.max())
    scores = torch.rand(*counts.shape, width, generator=generator)
    scores = scores.masked_fill(torch.arange(width) >= counts[..., None], -math.inf)
    sizes = torch.randint(1, 7, (*counts.shape, width), generator=generator)
    offsets = torch.cat([torch.full((*counts.shape, 1), 2), 2 + sizes.cumsum(-1)], -1)
    return scores, UnitTable(offsets=offsets, num_units=counts, max_units=width)


def with_indices(selector: Selector, units: UnitTable) -> UnitTable:
    """And what a scorer that keeps means, and the selector itself, keep of them: of random keys and values."""
    generator = torch.Generator().manual_seed(1)
    heads, num_rows = units.num_units.shape, int(units.offsets.max()) + 1
    num_heads = math.prod(heads)
    keys, values, centres = (torch.randn(num_heads, num_rows, 8, generator=generator).double() for _ in range(3))
    means = torch.randn(2, *heads, units.max_units, 8, generator=generator).double()
    kept = selector.row_index(keys, values, centres)
    return evolve(
        units,
        means=tuple(means),
        row_index={name: entry.view(*heads, *entry.shape[1:]) for name, entry in kept.items()},
    )


@pytest.mark.parametrize("selector", small_stages("selector"), ids=stage_id)
def test_every_selector_keeps_its_capacity(selector: Selector):
    """No head gets more rows than there are slots, a row twice, or a row of no unit; and only units that there are
    are estimated."""
    num_units = [[9, 1, 0], [4, 9, 2]]
    scores, units = random_units(num_units)
    made = selector.select(INPUTS, scores, with_indices(selector, units))
    selection = made if isinstance(made, Selection) else Selection(*made)
    rows, count = selection.rows, selection.count
    if selection.estimated is not None:
        assert not selection.estimated[torch.arange(9) >= units.num_units[..., None]].any()

    assert rows.shape == (2, 3, selector.capacity_in(INPUTS.layout)) and count.shape == (2, 3)
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


@given(byte_budget=st.integers(1, 400), max_tokens=st.integers(1, 40), row_bytes=st.integers(1, 50))
def test_top_bytes(byte_budget: int, max_tokens: int, row_bytes: int):
    """As many tokens as the bytes of the store pay for: the best ones, no more than there are, nor than slots."""
    scores, units = random_units([[9, 1, 0], [4, 9, 2]])
    num_tokens = min(max_tokens, byte_budget // row_bytes)
    inside = torch.arange(9) < units.num_units[..., None]
    there = torch.where(inside, units.sizes, 0).sum(-1)
    selector = TopBytes(byte_budget=byte_budget, max_tokens=max_tokens)
    rows, count = selector.select(evolve(INPUTS, row_bytes=row_bytes), scores, units)

    assert rows.shape == (2, 3, max_tokens) and torch.equal((rows >= 0).sum(-1), count)
    assert torch.equal(count, there.clamp(max=num_tokens))
    if num_tokens:
        assert torch.equal(rows[..., :num_tokens], TopBudget(token_budget=num_tokens).select(INPUTS, scores, units)[0])


def test_top_bytes_of_a_store_that_rounds():
    """A policy asks its own store: in 4 bits a budget holds more tokens than as they are."""
    attended = {}
    for transfer in (HostPool(), QuantizedHostPool(bits=4, group_size=16)):
        policy = policy_of("louiskv", sink_size=1, window_size=1, dense_layers=(), cluster_size=1).swap(
            trigger=EveryStep(),
            units=TokenUnits(),
            selector=TopBytes(byte_budget=4096, max_tokens=64),
            transfer=transfer,
        )
        case = Case(batch_size=1, padding=(0,), head_dim=16, turns=(Turn(chunks=(70,), num_steps=1),))
        layer = case.layer(policy, "offload")
        play(layer, case.text(layer.layout), case)
        attended[transfer.name] = len(layer.attended_positions(0, 0)) - 2
        assert attended[transfer.name] == min(64, 4096 // transfer.row_bytes(layer.layout))

    assert attended["host-pool"] == 16 < attended["quantized-host-pool"]


def test_nothing():
    """No rows, and no slots for any."""
    rows, count = SelectNothing().select(INPUTS, *random_units([[3, 2]]))

    assert SelectNothing().capacity == 0
    assert rows.shape == (1, 2, 0) and count.tolist() == [[0, 0]]


@pytest.mark.parametrize("token_budget", [0, -1, 10.0, "512", True])
def test_budget_that_is_none(token_budget: object):
    """A budget is a whole number of at least one token."""
    with pytest.raises(ConfigError, match=r"TopBudget\.token_budget must be an integer >= 1, got"):
        TopBudget(token_budget=token_budget)


@pytest.mark.parametrize("options, name", [({"byte_budget": 0}, "byte_budget"), ({"max_tokens": 2.5}, "max_tokens")])
def test_bytes_that_are_none(options: dict[str, object], name: str):
    """A whole number of at least one."""
    with pytest.raises(ConfigError, match=rf"TopBytes\.{name} must be an integer >= 1, got"):
        TopBytes(**options)


def test_room_is_left_empty():
    """A selection takes the budget; the slots behind it are for what comes before the next one."""
    scores, units = random_units([[9, 9, 9], [9, 9, 1]])
    selector = TopBudget(token_budget=5, room=3)
    rows, count = selector.select(INPUTS, scores, units)
    expected, counted = TopBudget(token_budget=5).select(INPUTS, scores, units)

    assert (selector.capacity, selector.capacity_in(INPUTS.layout)) == (5, 8)
    assert torch.equal(count, counted) and torch.equal(rows[..., :5], expected) and bool((rows[..., 5:] == -1).all())
