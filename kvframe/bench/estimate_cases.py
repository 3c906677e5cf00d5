"""Operations of a step that counts what it does not retrieve and ranks tokens by a sketch of their keys."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvframe.bench.case import Call, Case, KernelSizes, due_or_not, each, unit_offsets
from kvframe_kernels.append_token import Slots
from kvframe_kernels.key_sketch import Centres, Sketch, sketch_scores, window_sketch
from kvframe_kernels.missed_share import kept_lse, missed_share
from kvframe_kernels.packing import packed_size
from kvframe_kernels.select_units import select_runs
from kvframe_kernels.unattended_tokens import unattended_tokens


def _unattended_tokens(sizes: KernelSizes) -> list[Case]:
    num_bytes = sizes.num_kv_heads * (8 * sizes.token_budget + 8 * sizes.num_units)
    num_units = torch.full(sizes.heads, sizes.num_units, dtype=torch.int64, device=sizes.device)

    def call(_: int) -> Call:
        offsets = unit_offsets(sizes)
        rows = torch.rand(*sizes.heads, sizes.context // 2, device=sizes.device).argsort(-1)[..., : sizes.token_budget]
        rows = rows.contiguous()
        return lambda: unattended_tokens(rows, offsets, num_units, sizes.num_units)

    calls = each(call, sizes.copies(num_bytes))
    return [Case(op="unattended_tokens", state="every step", calls=calls, num_bytes=num_bytes)]


def _candidates(sizes: KernelSizes) -> tuple[Tensor, Tensor]:
    """Rows of random units in ascending order, int64 [B, H, C], and how many they are."""
    num_drawn = min(sizes.num_units, sizes.oversample * sizes.token_budget // sizes.unit_size)
    drawn = torch.rand(*sizes.heads, sizes.num_units, device=sizes.device).argsort(-1)[..., :num_drawn]
    tokens = torch.arange(sizes.unit_size, device=sizes.device)
    rows = (drawn.sort(-1).values[..., None] * sizes.unit_size + tokens).flatten(-2).contiguous()
    return rows, torch.full(sizes.heads, rows.shape[-1], dtype=torch.int64, device=sizes.device)


def _sketch_scores(sizes: KernelSizes) -> list[Case]:
    code_bytes = packed_size(sizes.head_dim, sizes.sketch_bits)
    heads, device = sizes.heads, sizes.device
    sketch = Sketch(
        torch.randint(0, 256, (*heads, sizes.context, code_bytes), dtype=torch.uint8, device=device),
        torch.rand(*heads, sizes.context, 1, device=device).to(sizes.dtype),
    )
    means = sizes.random(*heads, sizes.num_units, sizes.head_dim)
    channels = 1 + torch.rand(*heads, sizes.head_dim, device=device)
    query = sizes.random(1, sizes.num_qo_heads, sizes.head_dim)
    drawn, count = _candidates(sizes)
    # Of a candidate its row and its unit, its sketch and its score; and the mean key of every unit.
    of_candidates = drawn.numel() * (12 + code_bytes + sizes.dtype.itemsize + 4)
    num_bytes = of_candidates + drawn.numel() // sizes.unit_size * sizes.head_dim * sizes.dtype.itemsize

    def make(due: bool) -> list[Call]:
        flags = sizes.flags(due)

        def call(_: int) -> Call:
            rows = _candidates(sizes)[0]
            centres = Centres(means, (rows // sizes.unit_size).int())
            return lambda: sketch_scores(
                query,
                rows,
                count,
                sketch,
                sizes.sketch_bits,
                sizes.head_dim**-0.5,
                channels=channels,
                centres=centres,
                due=flags,
            )

        return each(call, sizes.copies(num_bytes))

    return due_or_not("sketch_scores", make, num_bytes)


def _missed_share(sizes: KernelSizes) -> list[Case]:
    drawn, count = _candidates(sizes)
    num_bytes = 12 * drawn.numel() + 8 * sizes.num_kv_heads * sizes.token_budget
    marks = torch.zeros(*sizes.heads, -(-sizes.context // 32), dtype=torch.int32, device=sizes.device)

    def call(_: int) -> Call:
        rows, shares = _candidates(sizes)[0], torch.rand(drawn.shape, device=sizes.device)
        resident = torch.rand(*sizes.heads, sizes.context, device=sizes.device).argsort(-1)[..., : sizes.token_budget]
        resident = resident.contiguous()
        return lambda: missed_share(resident, rows, count, shares, marks, sizes.context)

    calls = each(call, sizes.copies(num_bytes))
    return [Case(op="missed_share", state="every step", calls=calls, num_bytes=num_bytes)]


def _kept_lse(sizes: KernelSizes) -> list[Case]:
    num_slots = sizes.sink_size + sizes.token_budget + sizes.window_size + sizes.max_segment
    num_kept = num_slots - sizes.token_budget
    bias = torch.zeros(*sizes.heads, num_slots, dtype=sizes.dtype, device=sizes.device)
    resident = torch.zeros(*sizes.heads, sizes.token_budget, dtype=torch.int64, device=sizes.device)
    query = sizes.random(1, sizes.num_qo_heads, sizes.head_dim)
    num_bytes = sizes.num_kv_heads * num_kept * (sizes.head_dim + 1) * sizes.dtype.itemsize

    def call(_: int) -> Call:
        keys = sizes.random(*sizes.heads, num_slots, sizes.head_dim)
        slots = Slots(keys, keys, bias, resident, sizes.sink_size)
        return lambda: kept_lse(query, slots, sizes.head_dim**-0.5)

    return [Case(op="kept_lse", state="every step", calls=each(call, sizes.copies(num_bytes)), num_bytes=num_bytes)]


def _select_runs(sizes: KernelSizes) -> list[Case]:
    rows, count = _candidates(sizes)
    num_bytes = 12 * rows.numel() + 8 * sizes.num_kv_heads * sizes.token_budget

    def make(due: bool) -> list[Call]:
        flags = sizes.flags(due)

        def call(_: int) -> Call:
            scores = torch.randn(rows.shape, device=sizes.device).softmax(-1)
            return lambda: select_runs(scores, rows, count, 1, sizes.token_budget, due=flags)

        return each(call, sizes.copies(num_bytes))

    return due_or_not("select_runs", make, num_bytes)


def _window_sketch(sizes: KernelSizes) -> list[Case]:
    ring_size, segment = sizes.window_size + sizes.max_segment, sizes.max_segment
    code_bytes = packed_size(sizes.head_dim, sizes.sketch_bits)
    num_rows = 40 * segment
    sketch = Sketch(
        torch.zeros(*sizes.heads, num_rows, code_bytes, dtype=torch.uint8, device=sizes.device),
        torch.zeros(*sizes.heads, num_rows, 1, dtype=sizes.dtype, device=sizes.device),
    )
    channels = 1 + torch.rand(*sizes.heads, sizes.head_dim, device=sizes.device)
    size = torch.full(sizes.heads, segment, dtype=torch.int64, device=sizes.device)
    row_bytes = sizes.head_dim * sizes.dtype.itemsize + code_bytes + sizes.dtype.itemsize

    def make(leaves: bool) -> list[Call]:
        flags = sizes.flags(leaves)

        def call(number: int) -> Call:
            buffer = sizes.random(*sizes.heads, ring_size, sizes.head_dim)
            start = torch.full_like(size, number * segment)
            return lambda: window_sketch(
                sketch, sizes.sketch_bits, flags, start, size, buffer, 0, ring_size, centred=True, channels=channels
            )

        return each(call, min(32, sizes.copies(sizes.num_kv_heads * ring_size * row_bytes)))

    return due_or_not("window_sketch", make, sizes.num_kv_heads * segment * row_bytes)


ESTIMATE_CASES: tuple[Callable[[KernelSizes], list[Case]], ...] = (
    _unattended_tokens, _sketch_scores, _kept_lse, _missed_share, _select_runs, _window_sketch,
)  # fmt: skip
