"""What a slot asks of its stage, checked on the stage alone: shapes, dtypes, and what may depend on what."""

import math
from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from kvframe.composition import Policy
from kvframe.stages import SLOTS, Scorer, Selector, Trigger, UnitBuilder
from kvframe.testing.broken import Broken
from kvframe.testing.cases import Case, unit_table
from kvframe.types import BlockInputs, Decision, Execution, LayerLayout, LeavingUnits, Selection, StepInputs, UnitTable


def stages_keep_their_contracts(policy: Policy, case: Case, execution: Execution) -> None:
    """Every stage of a policy gives what its slot asks for."""
    for slot in SLOTS:
        stage, check = policy.stage(slot), _CONTRACTS.get(slot)
        if check is not None:
            try:
                check(stage, case)
            except Broken as broken:
                raise Broken(str(broken), stage) from None


def _randn(case: Case, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _require_tensor(what: str, value: object, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(value, Tensor):
        raise Broken(f"{what}: expected a {kinds} tensor {list(shape)}, got {value!r}")
    if tuple(value.shape) != shape or value.dtype not in dtypes:
        came = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        raise Broken(f"{what}: expected {kinds} {list(shape)}, got {came}")


def _inputs(case: Case, layout: LayerLayout, step: int = 0) -> StepInputs:
    query = _randn(case, layout.batch_size, layout.num_qo_heads, layout.head_dim + step)[..., step:]
    everywhere = torch.ones(layout.batch_size, layout.num_kv_heads, dtype=torch.bool)
    return StepInputs(
        query=query,
        key=_randn(case, layout.batch_size, layout.num_kv_heads, layout.head_dim),
        layout=layout,
        due=everywhere,
        num_tokens=torch.full_like(everywhere, 40, dtype=torch.int64),
        token_ids=torch.arange(layout.batch_size),
        row_bytes=layout.row_bytes,
        board={},
    )


def _check_trigger(trigger: Trigger, case: Case) -> None:
    """A flag for every row and KV head; two layers under one trigger decide on their own."""
    layout = case.layout()
    heads = (layout.batch_size, layout.num_kv_heads)
    states = [trigger.init(layout) for _ in range(2)]
    runs: list[list[Tensor]] = []
    for state in states:
        trigger.begin(_inputs(case, layout).query, state)
    for state in states:
        made = []
        for step in range(4):
            decision = trigger.step(_inputs(case, layout, step), state)
            if not isinstance(decision, Decision):
                raise Broken(f"step: expected a Decision, got {decision!r}")
            for name in ("due", "ahead", "full", "event"):
                flags = getattr(decision, name)
                if name == "due" or flags is not None:
                    _require_tensor(f"step: {name}", flags, heads, (torch.bool,))
            if decision.ahead is not None and not trigger.selects_ahead:
                raise Broken("step: the decision has heads select ahead; say so by the property selects_ahead")
            if decision.full is not None and not trigger.attends_in_full:
                raise Broken("step: the decision has heads attend to everything; say so by attends_in_full = True")
            made.append(decision.due.clone())
        runs.append(made)
    for step, (one, two) in enumerate(zip(*runs, strict=True)):
        if not torch.equal(one, two):
            raise Broken(
                f"step {step}: a second layer's state decides {two.tolist()} where the first one's decided "
                f"{one.tolist()}, given the same queries; keep what changes in the state, not on the trigger"
            )


def _check_units(builder: UnitBuilder, case: Case) -> None:
    """Every token of a block in exactly one unit; each head cut on its own."""
    if not 1 <= builder.min_size <= builder.max_size:
        raise Broken(f"expected 1 <= min_size <= max_size, got {builder.min_size} and {builder.max_size}")
    if builder.unit_size < 1:
        raise Broken(f"expected unit_size >= 1, got {builder.unit_size}")
    num_heads, num_tokens = 3, 1 + case.seed % 70
    keys = _randn(case, num_heads, num_tokens, case.head_dim)
    block = BlockInputs(layout=case.layout(), token_ids=torch.arange(num_tokens) * 7 % 11)
    units = builder.build_block(keys, block)
    _require_tensor("build: order", units.order, (num_heads, num_tokens), (torch.int64,))
    _require_tensor("build: sizes", units.sizes, (num_heads, units.sizes.shape[-1]), (torch.int64,))
    _require_tensor("build: num_units", units.num_units, (num_heads,), (torch.int64,))
    for head in range(num_heads):
        where, sizes = f"build: head {head} of {num_tokens} tokens", units.sizes[head]
        count = int(units.num_units[head])
        if sorted(units.order[head].tolist()) != list(range(num_tokens)):
            raise Broken(f"{where}: the order {units.order[head].tolist()} is no permutation of its tokens")
        if (sizes[:count] <= 0).any() or (sizes[count:] != 0).any() or int(sizes.sum()) != num_tokens:
            raise Broken(f"{where}: the sizes {sizes.tolist()} of {count} units do not add up to its tokens")
        alone = builder.build_block(keys[head : head + 1], block)
        if not torch.equal(alone.order[0], units.order[head]) or int(alone.num_units[0]) != count:
            raise Broken(f"{where}: cut alone it gives the order {alone.order[0].tolist()}, beside others another")
    layout = case.layout()
    due = torch.arange(layout.batch_size * layout.num_kv_heads).view(layout.batch_size, -1) % 2 == 0
    boundary = builder.boundary(_inputs(case, layout), Decision(due=due), builder.init(layout))
    if boundary is not None:
        _require_tensor("boundary", boundary, tuple(due.shape), (torch.bool,))


def _check_scorer(scorer: Scorer, case: Case) -> None:
    """An entry a unit that depends on its own tokens; a score a unit, and none for what does not exist."""
    layout = case.layout()
    num_heads, num_units, size = layout.batch_size * layout.num_kv_heads, 5, 3
    keys = _randn(case, num_heads, num_units * size, layout.head_dim)
    values = _randn(case, num_heads, num_units * size, layout.value_dim)
    unit_ids = (torch.arange(num_units * size) // size).expand(num_heads, -1)
    index = scorer.index(keys, values, unit_ids, num_units)
    for name, entries in index.items():
        shape = (num_heads, num_units, *entries.shape[2:])
        _require_tensor(f"index: {name}", entries, shape, (entries.dtype,))
    last = slice((num_units - 1) * size, None)
    alone = scorer.index(keys[-1:, last], values[-1:, last], torch.zeros(1, size, dtype=torch.int64), 1)
    if alone.keys() != index.keys():
        raise Broken(f"index: for one unit it gives {sorted(alone)}, for five {sorted(index)}")
    for name, entry in alone.items():
        if not torch.allclose(entry[0, 0], index[name][-1, -1], atol=1e-9, equal_nan=True):
            raise Broken(f"index: {name} of a unit alone is not what it is beside others")
    held = {name: entries.view(*layout_heads(layout), *entries.shape[1:]).clone() for name, entries in index.items()}
    _check_extend(scorer, case, layout, held)
    _check_scores(scorer, case, layout, held)


def layout_heads(layout: LayerLayout) -> tuple[int, int]:
    """B and H."""
    return layout.batch_size, layout.num_kv_heads


def _check_extend(scorer: Scorer, case: Case, layout: LayerLayout, index: dict[str, Tensor]) -> None:
    """A unit that leaves the window gets the entry that `index` would give it; no other entry changes."""
    heads, size, ring = layout_heads(layout), 3, 7
    column = torch.full(heads, 2)
    leaves = torch.arange(heads[0] * heads[1]).view(heads) % 2 == 0
    unit = LeavingUnits(
        leaves=leaves,
        column=column,
        start=torch.full(heads, 5),
        size=torch.full(heads, size),
        max_size=size + 1,
        keys=_randn(case, *heads, ring + 2, layout.head_dim),
        values=_randn(case, *heads, ring + 2, layout.value_dim),
        ring_first=2,
        ring_size=ring,
    )
    before = {name: entries.clone() for name, entries in index.items()}
    scorer.extend(index, unit)
    expected = scorer.index(*unit.rows(), 1)
    for name, entries in index.items():
        entry = expected[name].view(*heads, *entries.shape[3:]).to(entries.dtype)
        wanted = before[name].clone()
        wanted[leaves, 2] = entry[leaves]
        if not torch.allclose(entries, wanted, atol=1e-9, equal_nan=True):
            raise Broken(f"extend: {name} is not what index gives for the unit that leaves, or changes where none does")


def _check_scores(scorer: Scorer, case: Case, layout: LayerLayout, index: dict[str, Tensor]) -> None:
    """One score a unit, -inf and nothing else for units that do not exist, whatever lies in their place."""
    if scorer.num_notes:
        return  # notes are the runtime's to give
    heads, num_units = layout_heads(layout), next(iter(index.values())).shape[2] if index else 5
    counts = torch.arange(heads[0] * heads[1]).view(heads) % (num_units + 1)
    units = unit_table(torch.full((*heads, num_units), 3), counts)
    absent = torch.arange(num_units) >= counts[..., None]
    state = scorer.init(layout)
    scorer.begin(_inputs(case, layout).query, state)
    inputs = _inputs(case, layout)
    inputs = evolve(inputs, query=scorer.probe(inputs, state), state=state)
    scores = scorer.score(inputs, index, units)
    _require_tensor("score", scores, (*heads, num_units), (torch.float32, torch.float64))
    if scores.isnan().any():
        raise Broken("score: some are NaN")
    if not (scores[absent] == -math.inf).all():
        raise Broken("score: expected -inf for units that do not exist, those from units.num_units on")
    for entries in index.values():
        entries[absent] = -100
    again = scorer.score(inputs, index, units)
    if not torch.equal(again, scores):
        raise Broken("score: it depends on what lies in the place of units that do not exist")


def _check_selector(selector: Selector, case: Case) -> None:
    """No head gets more rows than there are slots, a row twice, or a row of no unit."""
    layout = case.layout()
    heads, max_units = layout_heads(layout), 9
    counts = (torch.arange(heads[0] * heads[1]).view(heads) * 5 + case.seed) % (max_units + 1)
    generator = torch.Generator().manual_seed(case.seed)
    scores = torch.rand(*heads, max_units, generator=generator)
    scores = scores.masked_fill(torch.arange(max_units) >= counts[..., None], -math.inf)
    sizes = torch.randint(1, 7, (*heads, max_units), generator=generator)
    offsets = torch.cat([torch.full((*heads, 1), 2), 2 + sizes.cumsum(-1)], -1)
    num_heads, num_rows = heads[0] * heads[1], int(offsets.max())
    keys, values = (_randn(case, num_heads, num_rows, width) for width in (layout.head_dim, layout.value_dim))
    rows_kept = selector.row_index(keys, values, keys * 0)
    kept = {name: rows.view(*heads, *rows.shape[1:]) for name, rows in rows_kept.items()}
    means = (
        torch.zeros(*heads, max_units, layout.head_dim, dtype=layout.dtype),
        torch.zeros(*heads, max_units, layout.value_dim, dtype=layout.dtype),
    )
    units = UnitTable(offsets=offsets, num_units=counts, max_units=max_units, means=means, row_index=kept)
    selection = Selection.of(selector.select(_inputs(case, layout), scores, units))
    capacity = selector.capacity_in(layout)
    _require_tensor("select: rows", selection.rows, (*heads, capacity), (torch.int64,))
    _require_tensor("select: count", selection.count, heads, (torch.int64,))
    for batch in range(heads[0]):
        for head in range(heads[1]):
            where = f"select: row {batch}, KV head {head}"
            rows, count = selection.rows[batch, head].tolist(), int(selection.count[batch, head])
            taken, last = rows[:count], int(offsets[batch, head, counts[batch, head]])
            if not 0 <= count <= capacity:
                raise Broken(f"{where}: a count of {count}, expected at most the capacity of {capacity}")
            if len(set(taken)) != len(taken):
                raise Broken(f"{where}: the rows {taken} have one twice")
            if not all(2 <= row < last for row in taken):
                raise Broken(f"{where}: the rows {taken} are not all of units, which are the rows 2 to {last - 1}")
            if any(row != -1 for row in rows[count:]):
                raise Broken(f"{where}: behind the count of {count}, expected -1, got {rows[count:]}")


_CONTRACTS: dict[str, Callable[[Any, Case], None]] = {
    "trigger": _check_trigger,
    "units": _check_units,
    "scorer": _check_scorer,
    "selector": _check_selector,
}
