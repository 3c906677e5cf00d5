"""The forced schedule keeps its promises: what fires, and what is missing, is what was asked for."""

import math
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

import kvframe
from kvframe import Decision, EstimateRest, LayerLayout, SketchRerank, StepInputs, TopBudget, Trigger, UnitTable
from kvframe.bench.forced import ForcedSelector, ScheduledTrigger, force
from kvframe.bench.forced_reference import PLACES, forced_scores_reference
from kvframe.errors import ConfigError
from kvframe.runtime import RetrievalLayer
from kvframe.testing.altered import altered
from kvframe.testing.cases import make_layout, make_text
from kvframe_kernels.select_units import ROWS_RECALLED, ROWS_SELECTED, SELECTIONS

HEADS = (2, 3)


def make_inputs(layout: LayerLayout, due: Tensor | None = None) -> StepInputs:
    """A step of a layer; the query does not matter."""
    query = torch.ones(layout.batch_size, layout.num_qo_heads, layout.head_dim, dtype=layout.dtype)
    return StepInputs(query=query, layout=layout, due=due)


def fired(trigger: Trigger, num_steps: int, layer_idx: int = 0, state: Any = None) -> Tensor:
    """What is due in the steps after a prompt, bool [steps, B, H]."""
    layout = evolve(make_layout(batch_size=HEADS[0], num_kv_heads=HEADS[1]), layer_idx=layer_idx)
    state = trigger.init(layout) if state is None else state
    trigger.begin(make_inputs(layout).query, state)
    return torch.stack([trigger.step(make_inputs(layout), state).due.clone() for _ in range(num_steps)])


def scheduled(rate: float, num_steps: int = 200, seed: int = 0) -> ScheduledTrigger:
    """A schedule in place of a trigger that is always due."""
    return ScheduledTrigger(inner=kvframe.EveryStep(), rate=rate, num_steps=num_steps, seed=seed)


@pytest.mark.parametrize("rate", [0.0, 0.07, 0.5, 1.0])
def test_rate_is_exact(rate: float) -> None:
    """Behind the first step, a whole schedule fires as often as was asked, for every sequence."""
    due = fired(scheduled(rate), 401)

    assert bool(due[0].all())
    assert due[1:].sum(0).unique().tolist() == [2 * round(200 * rate)]
    assert torch.equal(due[1:201], due[201:])


def test_layers_and_sequences_have_schedules_of_their_own() -> None:
    """All KV heads of a sequence fire together; sequences, layers and seeds do not; the same seed repeats."""
    due = fired(scheduled(0.3), 100)

    assert bool((due == due[..., :1]).all())
    assert not torch.equal(due[:, 0], due[:, 1])
    assert not torch.equal(due, fired(scheduled(0.3), 100, layer_idx=1))
    assert not torch.equal(due, fired(scheduled(0.3, seed=1), 100))
    assert torch.equal(due, fired(scheduled(0.3), 100))


def test_inner_trigger_does_its_work() -> None:
    """It is begun and stepped; a new turn starts the schedule again, in the same tensors."""
    calls: list[str] = []

    class Counting(kvframe.Once):
        def begin(self, query: Tensor, state: Any) -> None:
            calls.append("begin")

        def step(self, inputs: StepInputs, state: Any) -> Decision:
            calls.append("step")
            return super().step(inputs, state)

    trigger = ScheduledTrigger(inner=Counting(), rate=0.0, num_steps=4)
    state = trigger.init(make_layout(batch_size=HEADS[0], num_kv_heads=HEADS[1]))
    place = state.steps.data_ptr()
    for _ in range(2):
        assert fired(trigger, 3, state=state).all(-1).all(-1).tolist() == [True, False, False]

    assert calls == ["begin", "step", "step", "step"] * 2
    assert state.steps.data_ptr() == place


def table(sizes: Tensor, num_units: int, first: int = 4) -> UnitTable:
    """Units of these sizes [U] for all heads, the first `num_units` of which exist."""
    offsets = first + torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    return UnitTable(
        offsets=offsets.expand(*HEADS, -1).contiguous(),
        num_units=torch.full(HEADS, num_units),
        max_units=len(sizes),
    )


@pytest.mark.parametrize("miss, tolerance", [(0.0, 0.0), (0.1, 0.02), (0.3, 0.02), (0.6, 0.02), (1.0, 0.1)])
def test_miss_is_what_was_asked(miss: float, tolerance: float) -> None:
    """Each selection fills the budget; on average that share of it was not in the one before."""
    torch.manual_seed(0)
    units = table(torch.randint(1, 32, (2000,)), 1500)
    layout = make_layout(batch_size=HEADS[0], num_kv_heads=HEADS[1])
    selector = ForcedSelector(selector=TopBudget(token_budget=512), miss=miss)
    inputs = make_inputs(layout, torch.ones(HEADS, dtype=torch.bool))
    missed, before = [], None
    for _ in range(40):
        rows, count = selector.select(inputs, torch.zeros(*HEADS, 2000), units)
        assert count.unique().tolist() == [512] and int(rows.max()) < int(units.offsets[0, 0, 1500])
        now = [set(head.tolist()) for head in rows.flatten(0, 1)]
        if before is not None:
            missed += [len(new - old) / 512 for new, old in zip(now, before, strict=True)]
        before = now

    assert sum(missed) / len(missed) == pytest.approx(miss, abs=tolerance)
    assert now[0] != now[1]


@pytest.mark.parametrize("miss, tolerance", [(0.0, 0.0), (0.3, 0.06)])
def test_miss_of_what_is_ranked(miss: float, tolerance: float) -> None:
    """Tokens of a sliding stretch of candidates, ranked by their keys alone, whatever the step's query: about as many
    of them go as of the candidates, and they lie scattered."""
    generator = torch.Generator().manual_seed(0)
    layout = make_layout(batch_size=HEADS[0], num_kv_heads=HEADS[1])
    selector = ForcedSelector(selector=EstimateRest(selector=SketchRerank(token_budget=128)), miss=miss)
    units = table(torch.full((300,), 8), 300, first=0)
    keys = torch.randn(math.prod(HEADS), 2400, layout.head_dim, generator=generator, dtype=layout.dtype)
    kept = selector.row_index(keys, keys, torch.zeros_like(keys))
    means = torch.zeros(*HEADS, 300, layout.head_dim, dtype=layout.dtype)
    units = evolve(
        units,
        means=(means, means),
        row_index={name: entry.view(*HEADS, *entry.shape[1:]) for name, entry in kept.items()},
    )
    missed, before = [], None
    for step in range(12):
        inputs = make_inputs(layout, torch.ones(HEADS, dtype=torch.bool))
        inputs = evolve(inputs, query=inputs.query * (-1) ** step)
        rows, _ = selector.select(inputs, torch.zeros(*HEADS, 300), units)
        now = [set(head.tolist()) for head in rows.flatten(0, 1)]
        if before is not None:
            missed += [len(new - old) / 128 for new, old in zip(now, before, strict=True)]
        before = now

    assert selector.estimates and selector.needs_means
    assert sum(missed) / len(missed) == pytest.approx(miss, abs=tolerance)
    assert all(len({row // 8 for row in head}) > 32 for head in now)  # of units of 8, 16 would hold them


def test_only_due_heads_move_on() -> None:
    """Where nothing is due, the next selection is as if the step had not been."""
    units = table(torch.full((400,), 8), 400)
    layout = make_layout(batch_size=HEADS[0], num_kv_heads=HEADS[1])
    due = torch.zeros(HEADS, dtype=torch.bool)
    due[0, 1] = True
    selector = ForcedSelector(selector=TopBudget(token_budget=64), miss=0.5)
    for _ in range(3):
        selector.select(make_inputs(layout, due), torch.zeros(*HEADS, 400), units)
    [starts] = selector._starts.values()

    assert starts.tolist() == [[0, 3 * (32 * PLACES // 3200), 0], [0, 0, 0]]


def test_layers_slide_on_their_own() -> None:
    """State belongs to a layer, and to a shape."""
    units = table(torch.full((400,), 8), 400)
    selector = ForcedSelector(selector=TopBudget(token_budget=64), miss=0.5)
    for layer_idx in (0, 0, 1):
        layout = evolve(make_layout(batch_size=HEADS[0], num_kv_heads=HEADS[1]), layer_idx=layer_idx)
        selector.select(make_inputs(layout, torch.ones(HEADS, dtype=torch.bool)), torch.zeros(*HEADS, 400), units)

    assert [int(starts[0, 0]) // (32 * PLACES // 3200) for starts in selector._starts.values()] == [2, 1]


def test_units_keep_their_places() -> None:
    """More units change no score, and no two units of a head have the same."""
    starts, due = torch.zeros(HEADS, dtype=torch.int64), torch.ones(HEADS, dtype=torch.bool)
    few, more = (table(torch.full((5000,), 8), number) for number in (3000, 5000))
    scores, longer = (
        forced_scores_reference(starts, due, units.offsets, units.num_units, 5000, 0) for units in (few, more)
    )

    assert torch.equal(scores[..., :3000], longer[..., :3000])
    assert bool((scores[..., 3000:] == -torch.inf).all())
    assert all(len(head.unique()) == 5000 for head in longer.flatten(0, 1))


def test_forced_policy_is_a_policy() -> None:
    """It keeps sizes and the other stages, and is plain data."""
    policy = kvframe.policy("louiskv")
    forced = force(policy, fire_rate=0.07, miss=0.3, num_steps=64)
    data = forced.to_dict()

    assert forced.selector.capacity == policy.selector.capacity
    assert (forced.units, forced.scorer, forced.transfer) == (policy.units, policy.scorer, policy.transfer)
    assert data["trigger"]["inner"]["stage"] == "semantic" and data["selector"]["miss"] == 0.3


@pytest.mark.parametrize("rates", [{"fire_rate": 1.5, "miss": 0}, {"fire_rate": 0, "miss": -0.1}])
def test_rates_out_of_range(rates: dict[str, float]) -> None:
    """A share lies between 0 and 1."""
    with pytest.raises(ConfigError, match="must lie between 0 and 1"):
        force(kvframe.policy("louiskv"), **rates, num_steps=8)


def test_a_trigger_that_reviews() -> None:
    """It looks at what is missed in every step, and the schedule decides: so many selections, of which so much is
    missing."""
    num_steps, reviews = 40, []

    def watch(original: Any, *args: Any) -> Tensor:
        reviews.append(original(*args))
        return reviews[-1]

    policy = kvframe.policy(
        "louiskv-plus", token_budget=32, oversample=4, cluster_size=4, sink_size=2, window_size=8, dense_layers=()
    )
    watched = policy.swap(trigger=altered(policy.trigger, review=watch))
    layout = make_layout(batch_size=1, num_kv_heads=2, head_dim=16)
    text = make_text(layout, 1000 + num_steps, seed=1)
    layer = RetrievalLayer(
        layout, force(watched, fire_rate=0.5, miss=0.25, num_steps=num_steps), 1000 + num_steps, "offload"
    )
    layer.prompt(*text.span(0, 1000), [1000], 1000)
    for step in range(1000, 1000 + num_steps):
        layer.decode(*text.span(step, step + 1))
    tallies = layer.stats.tallies

    assert len(reviews) == num_steps
    # The first step is due on top of the schedule, unless that has it.
    assert set(tallies[SELECTIONS].flatten().tolist()) <= {num_steps // 2, num_steps // 2 + 1}
    missing = tallies[ROWS_RECALLED].sum() / tallies[ROWS_SELECTED].sum()
    assert 0.1 < float(missing) < 0.45
