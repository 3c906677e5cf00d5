"""Single operations with inputs as a decode step has them, in turn over several copies of these inputs."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvframe.bench.case import REPEATS, Call, Case, KernelSizes, due_or_not, each, unit_offsets
from kvframe.bench.estimate_cases import ESTIMATE_CASES
from kvframe.bench.forced_reference import forced_scores_reference, scheduled_due_reference
from kvframe.memory.pinned import pinned_empty
from kvframe_kernels.append_token import NUM_COUNTS, Slots, append_token
from kvframe_kernels.gather_kv import gather_kv, store_token
from kvframe_kernels.kmeans import kmeans
from kvframe_kernels.query_similarity import query_turned
from kvframe_kernels.select_units import NUM_TALLIES, exchange_resident, select_units
from kvframe_kernels.slot_attention import Entries, make_arrivals, slot_attention
from kvframe_kernels.unit_index import unit_bounds, unit_mean, window_bounds, window_mean
from kvframe_kernels.unit_scores import box_scores, unit_scores


def make_cases(sizes: KernelSizes) -> Iterator[Callable[[], list[Case]]]:
    """What makes the cases of one operation after the other, so that the inputs of one can go before the next."""
    makers: list[Callable[[KernelSizes], list[Case]]] = [
        _query_turned, _append_token, _store_token, _window_mean, _window_bounds, _unit_scores, _box_scores,
        _select_units, _exchange_resident, _gather_kv, _slot_attention, *ESTIMATE_CASES, _unit_mean, _unit_bounds,
        _kmeans, _forced,
    ]  # fmt: skip
    for maker in makers:
        yield lambda maker=maker: maker(sizes)  # type: ignore[misc]


def _query_turned(sizes: KernelSizes) -> list[Case]:
    shape = (1, sizes.num_qo_heads, sizes.head_dim)

    def call(_: int) -> Call:
        query, previous, first = sizes.random(*shape), sizes.random(*shape), sizes.flags(False)
        return lambda: query_turned(query, previous, first, 0.7, num_kv_heads=sizes.num_kv_heads, per_kv_head=False)

    num_bytes = 3 * math.prod(shape) * sizes.dtype.itemsize
    return [Case(op="query_turned", state="every step", calls=each(call, 32), num_bytes=num_bytes)]


def _slots(sizes: KernelSizes, capacity: int, ring_size: int) -> Slots:
    num_slots = sizes.sink_size + capacity + ring_size
    return Slots(
        keys=sizes.random(*sizes.heads, num_slots, sizes.head_dim),
        values=sizes.random(*sizes.heads, num_slots, sizes.head_dim),
        bias=torch.full((*sizes.heads, num_slots), -math.inf, dtype=sizes.dtype, device=sizes.device),
        resident_rows=torch.full((*sizes.heads, capacity), -1, dtype=torch.int64, device=sizes.device),
        sink_size=sizes.sink_size,
    )


def _append_token(sizes: KernelSizes) -> list[Case]:
    copies = 8
    # Long enough for sinks, window and resident slots to fill before the clock starts.
    settle = 2 + (sizes.sink_size + sizes.window_size + sizes.token_budget + 64) // REPEATS

    def make(max_size: int) -> Callable[[int], Call]:
        def call(_: int) -> Call:
            counts = torch.zeros(NUM_COUNTS, *sizes.heads, dtype=torch.int64, device=sizes.device)
            offsets = torch.full((*sizes.heads, 8192), sizes.sink_size, dtype=torch.int32, device=sizes.device)
            slots = _slots(sizes, sizes.token_budget, sizes.window_size + max_size)
            keys, values = sizes.random(*sizes.heads, sizes.head_dim), sizes.random(*sizes.heads, sizes.head_dim)
            finite = sizes.flags(True)
            return lambda: append_token(
                counts, offsets, None, keys, values, slots, finite,
                window_size=sizes.window_size, min_size=min(4, max_size), max_size=max_size,
            )  # fmt: skip

        return call

    num_bytes = 4 * sizes.num_kv_heads * sizes.head_dim * sizes.dtype.itemsize
    segment = sizes.max_segment
    return [
        Case(
            op="append_token", state=f"a unit of {size} leaves every {size} steps", calls=each(make(size), copies),
            num_bytes=num_bytes, settle=settle,
        )
        for size in (segment, 1)
    ]  # fmt: skip


def _pool(sizes: KernelSizes) -> Tensor:
    shape = (*sizes.heads, sizes.context, 2 * sizes.head_dim)
    return pinned_empty(shape, sizes.dtype, sizes.device).zero_()


def _store_token(sizes: KernelSizes) -> list[Case]:
    pool = _pool(sizes)

    def call(number: int) -> Call:
        rows = torch.full(sizes.heads, number, dtype=torch.int64, device=sizes.device)
        keys, values = sizes.random(*sizes.heads, sizes.head_dim), sizes.random(*sizes.heads, sizes.head_dim)
        return lambda: store_token(pool, rows, 0, keys, values)

    num_bytes = 2 * sizes.num_kv_heads * sizes.head_dim * sizes.dtype.itemsize
    return [Case(op="store_token", state="every step", calls=each(call, 32), num_bytes=num_bytes, over="link")]


def _window_mean(sizes: KernelSizes) -> list[Case]:
    ring_size = sizes.window_size + sizes.max_segment
    copies = sizes.copies(sizes.num_kv_heads * ring_size * sizes.head_dim * sizes.dtype.itemsize)
    index = sizes.random(*sizes.heads, 64, sizes.head_dim)
    size = torch.full(sizes.heads, sizes.max_segment, dtype=torch.int64, device=sizes.device)

    def make(leaves: Tensor) -> Callable[[int], Call]:
        def call(number: int) -> Call:
            buffer = sizes.random(*sizes.heads, ring_size, sizes.head_dim)
            column, start = torch.full_like(size, number), torch.full_like(size, 7 * number)
            return lambda: window_mean(index, column, leaves, start, size, buffer, 0, ring_size)

        return call

    num_bytes = sizes.num_kv_heads * (sizes.max_segment + 1) * sizes.head_dim * sizes.dtype.itemsize
    return due_or_not("window_mean", lambda due: each(make(sizes.flags(due)), copies), num_bytes)


def _window_bounds(sizes: KernelSizes) -> list[Case]:
    copies = sizes.copies(sizes.num_kv_heads * sizes.window_size * sizes.head_dim * sizes.dtype.itemsize)
    lower, upper = sizes.random(2, *sizes.heads, 64, sizes.head_dim).unbind()
    size = torch.full(sizes.heads, sizes.unit_size, dtype=torch.int64, device=sizes.device)

    def make(leaves: Tensor) -> Callable[[int], Call]:
        def call(number: int) -> Call:
            buffer = sizes.random(*sizes.heads, sizes.window_size, sizes.head_dim)
            column, start = torch.full_like(size, number), torch.full_like(size, 7 * number)
            return lambda: window_bounds(lower, upper, column, leaves, start, size, buffer, 0, sizes.window_size)

        return call

    num_bytes = sizes.num_kv_heads * (sizes.unit_size + 2) * sizes.head_dim * sizes.dtype.itemsize
    return due_or_not("window_bounds", lambda due: each(make(sizes.flags(due)), copies), num_bytes)


def _unit_scores(sizes: KernelSizes) -> list[Case]:
    centroid_bytes = sizes.num_kv_heads * sizes.num_units * sizes.head_dim * sizes.dtype.itemsize
    copies = sizes.copies(centroid_bytes)
    centroids = [sizes.random(*sizes.heads, sizes.num_units, sizes.head_dim) for _ in range(copies)]
    query = sizes.random(1, sizes.num_qo_heads, sizes.head_dim)
    num_units = torch.full(sizes.heads, sizes.num_units, dtype=torch.int64, device=sizes.device)

    def calls(due: bool) -> list[Call]:
        flags = sizes.flags(due)
        return [
            lambda one=one: unit_scores(query, one, num_units, sizes.head_dim**-0.5, due=flags)  # type: ignore[misc]
            for one in centroids
        ]

    num_bytes = centroid_bytes + 4 * sizes.num_kv_heads * sizes.num_units
    return due_or_not("unit_scores", calls, num_bytes)


def _box_scores(sizes: KernelSizes) -> list[Case]:
    bound_bytes = 2 * sizes.num_kv_heads * sizes.num_units * sizes.head_dim * sizes.dtype.itemsize
    corners = [
        sizes.random(2, *sizes.heads, sizes.num_units, sizes.head_dim).sort(0).values.unbind()
        for _ in range(sizes.copies(bound_bytes))
    ]
    query = sizes.random(1, sizes.num_qo_heads, sizes.head_dim)
    num_units = torch.full(sizes.heads, sizes.num_units, dtype=torch.int64, device=sizes.device)

    def call(lower: Tensor, upper: Tensor, softmax: bool) -> Call:
        return lambda: box_scores(query, lower, upper, num_units, sizes.head_dim**-0.5, softmax=softmax)

    num_bytes = bound_bytes + 4 * sizes.num_kv_heads * sizes.num_units
    return [
        Case(
            op="box_scores",
            state=state,
            calls=[call(lower, upper, softmax) for lower, upper in corners],
            num_bytes=num_bytes,
        )
        for state, softmax in (("every step", False), ("every step, normalised", True))
    ]


def _select_units(sizes: KernelSizes) -> list[Case]:
    offsets = unit_offsets(sizes)
    num_bytes = sizes.num_kv_heads * (8 * sizes.num_units + 8 * sizes.token_budget)
    scores = [
        torch.randn(*sizes.heads, sizes.num_units, device=sizes.device).softmax(-1)
        for _ in range(sizes.copies(num_bytes))
    ]

    def calls(due: bool) -> list[Call]:
        flags = sizes.flags(due)
        return [
            lambda one=one: select_units(one, offsets, sizes.token_budget, due=flags)  # type: ignore[misc]
            for one in scores
        ]

    return due_or_not("select_units", calls, num_bytes)


def _exchange_resident(sizes: KernelSizes) -> list[Case]:
    copies = 16
    capacity, num_missing = sizes.token_budget, round(sizes.miss * sizes.token_budget)

    def make(due: bool) -> list[Call]:
        flags = sizes.flags(due)
        count = torch.full(sizes.heads, capacity, dtype=torch.int64, device=sizes.device)
        first: list[Call] = []
        second: list[Call] = []
        for _ in range(copies):
            slots = _slots(sizes, capacity, 1)
            counts = torch.zeros(NUM_COUNTS, *sizes.heads, dtype=torch.int64, device=sizes.device)
            tallies = torch.zeros(NUM_TALLIES, *sizes.heads, dtype=torch.int64, device=sizes.device)
            words = -(-sizes.context // 32)
            marks = torch.zeros(*sizes.heads, words, dtype=torch.int32, device=sizes.device)
            drawn = torch.randperm(sizes.context, device=sizes.device)[: capacity + num_missing]
            # Two selections that differ in the share that is missing, one after the other for ever.
            for calls, rows in ((first, drawn[:capacity]), (second, drawn[num_missing:])):
                wanted = rows.sort().values.expand(*sizes.heads, -1).contiguous()
                calls.append(_exchange(slots, counts, wanted, count, flags, tallies, marks, sizes.context))
        return first + second

    return due_or_not("exchange_resident", make, 4 * 8 * sizes.num_kv_heads * capacity)


def _exchange(slots: Slots, *arguments: Any) -> Call:
    return lambda: exchange_resident(slots, *arguments)


def _gather_kv(sizes: KernelSizes) -> list[Case]:
    pool = _pool(sizes)
    slots = _slots(sizes, sizes.token_budget, 0)
    resident = slice(sizes.sink_size, slots.ring_first)
    keys, values = slots.keys[:, :, resident], slots.values[:, :, resident]
    num_units = sizes.token_budget // sizes.unit_size

    def call_for(num_missing: int) -> Callable[[int], Call]:
        def call(_: int) -> Call:
            units = torch.stack(
                [torch.randperm(sizes.num_units, device=sizes.device)[:num_units] for _ in range(sizes.num_kv_heads)]
            )
            units[:, num_missing:] = -1
            tokens = torch.arange(sizes.unit_size, device=sizes.device)
            rows = torch.where(units[..., None] < 0, -1, units[..., None] * sizes.unit_size + tokens)
            incoming = rows.flatten(1)[None].contiguous()
            return lambda: gather_kv(pool, incoming, 0, keys, values)

        return call

    unit_bytes = sizes.num_kv_heads * sizes.unit_size * 2 * sizes.head_dim * sizes.dtype.itemsize
    return [
        Case(
            op="gather_kv", state=f"{num} of {num_units} units" if num else "nothing due",
            calls=each(call_for(num), 16), num_bytes=num * unit_bytes, over="link",
        )
        for num in (0, round(sizes.miss * num_units), num_units)
    ]  # fmt: skip


def _slot_attention(sizes: KernelSizes) -> list[Case]:
    """Over slots alone, and over slots and one virtual entry for each unit."""
    cases = []
    for batch_size in sizes.attention_batches:
        heads = (batch_size, sizes.num_kv_heads)
        for num_entries in (0, sizes.num_units):
            num_slots = sizes.num_slots
            row_bytes = 2 * sizes.head_dim * sizes.dtype.itemsize
            of_entries = num_entries * (row_bytes + 4)
            num_bytes = math.prod(heads) * (num_slots * (row_bytes + sizes.dtype.itemsize) + of_entries)

            def call(_: int, heads: tuple[int, int] = heads, num_entries: int = num_entries) -> Call:
                query = sizes.random(heads[0], sizes.num_qo_heads, 1, sizes.head_dim)
                keys, values = (sizes.random(*heads, sizes.num_slots, sizes.head_dim) for _ in range(2))
                bias = torch.zeros(*heads, sizes.num_slots, dtype=sizes.dtype, device=sizes.device)
                entries = None
                if num_entries:
                    shape = (*heads, num_entries)
                    entries = Entries(
                        keys=sizes.random(*shape, sizes.head_dim),
                        values=sizes.random(*shape, sizes.head_dim),
                        counts=torch.randint(1, sizes.unit_size + 1, shape, dtype=torch.int32, device=sizes.device),
                    )
                arrivals = make_arrivals(heads[0], sizes.num_qo_heads, sizes.device)
                scale = sizes.head_dim**-0.5
                return lambda: slot_attention(query, keys, values, bias, scale, entries=entries, arrivals=arrivals)

            state = f"batch {batch_size}, {num_slots:,} slots"
            if num_entries:
                state += f", {num_entries:,} entries"
            calls = each(call, sizes.copies(num_bytes))
            cases.append(Case(op="slot_attention", state=state, calls=calls, num_bytes=num_bytes))
    return cases


def _unit_mean(sizes: KernelSizes) -> list[Case]:
    rows = sizes.random(sizes.num_kv_heads, sizes.context, sizes.head_dim)
    ids = (torch.arange(sizes.context, device=sizes.device) // sizes.unit_size).expand(sizes.num_kv_heads, -1)
    ids = ids.contiguous()
    calls: list[Call] = [lambda: unit_mean(rows, ids, sizes.num_units)]
    state = f"prompt of {sizes.context:,} tokens"
    return [Case(op="unit_mean", state=state, calls=calls, num_bytes=rows.nbytes + ids.nbytes, in_graph=False)]


def _unit_bounds(sizes: KernelSizes) -> list[Case]:
    rows = sizes.random(sizes.num_kv_heads, sizes.context, sizes.head_dim)
    ids = (torch.arange(sizes.context, device=sizes.device) // sizes.unit_size).expand(sizes.num_kv_heads, -1)
    ids = ids.contiguous()
    calls: list[Call] = [lambda: unit_bounds(rows, ids, sizes.num_units)]
    state = f"prompt of {sizes.context:,} tokens"
    return [Case(op="unit_bounds", state=state, calls=calls, num_bytes=rows.nbytes + ids.nbytes, in_graph=False)]


def _kmeans(sizes: KernelSizes) -> list[Case]:
    cases = []
    for num_tokens in sizes.prompts:
        block = min(sizes.block_size, num_tokens)
        keys = sizes.random(sizes.num_kv_heads * (num_tokens // block), block, sizes.head_dim)

        def call(keys: Tensor = keys, block: int = block) -> None:
            kmeans(keys, max(1, block // sizes.unit_size), sizes.num_iterations, 4 * sizes.unit_size)

        state = f"{num_tokens:,} tokens in blocks of {sizes.block_size:,}, {sizes.num_iterations} iterations"
        passes = sizes.num_iterations + 1
        cases.append(Case(op="kmeans", state=state, calls=[call], num_bytes=passes * keys.nbytes, in_graph=False))
    return cases


def _forced(sizes: KernelSizes) -> list[Case]:
    """What the forced schedule of `kvframe bench decode` adds to a step."""
    scheduled: Callable[..., None] = scheduled_due_reference
    scores: Callable[..., Tensor] = forced_scores_reference
    if sizes.device.type == "cuda":
        from kvframe.bench.forced_kernel import forced_scores_triton, scheduled_due_triton

        scheduled, scores = scheduled_due_triton, forced_scores_triton
    steps = torch.zeros(1, dtype=torch.int64, device=sizes.device)
    schedule = torch.zeros(512, 1, dtype=torch.bool, device=sizes.device)
    fired, starts = sizes.flags(False), torch.zeros(sizes.heads, dtype=torch.int64, device=sizes.device)
    offsets = unit_offsets(sizes)
    num_units = torch.full(sizes.heads, sizes.num_units, dtype=torch.int64, device=sizes.device)
    advance = round(sizes.miss * sizes.token_budget)

    def calls(due: bool) -> list[Call]:
        flags = sizes.flags(due)
        return [lambda: scores(starts, flags, offsets, num_units, sizes.num_units, advance)]

    always = Case(op="(bench) schedule", state="every step", calls=[lambda: scheduled(steps, schedule, fired)])
    return [always, *due_or_not("(bench) forced scores", calls, 4 * sizes.num_kv_heads * sizes.num_units)]
