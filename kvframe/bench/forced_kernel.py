"""What forces a schedule, as Triton kernels: one program says what is due, one a KV head makes scores."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvframe.bench.forced_reference import HEAD_STEP, MIX_FIRST, MIX_OFFSET, MIX_SECOND, PLACES

_MASK = tl.constexpr(PLACES - 1)
_HEAD_STEP = tl.constexpr(HEAD_STEP)
_MIX_FIRST = tl.constexpr(MIX_FIRST)
_MIX_OFFSET = tl.constexpr(MIX_OFFSET)
_MIX_SECOND = tl.constexpr(MIX_SECOND)


@triton.jit
def _scheduled_due_kernel(steps, schedule, due, num_steps, batch_size, num_kv_heads, LANES: tl.constexpr):
    step = tl.load(steps)
    lanes = tl.arange(0, LANES)
    inside = lanes < batch_size * num_kv_heads
    place = (step % num_steps) * batch_size + lanes // num_kv_heads
    drawn = tl.load(schedule + place, mask=inside, other=0).to(tl.int32)
    is_first = (step == 0).to(tl.int32)
    tl.debug_barrier()  # every warp has read the step before one writes it
    tl.store(due + lanes, drawn + is_first > 0, mask=inside)
    tl.store(steps, step + 1)


def scheduled_due_triton(steps: Tensor, schedule: Tensor, due: Tensor) -> None:
    """Arguments as in `scheduled_due_reference`, all contiguous."""
    num_steps, batch_size = schedule.shape
    _scheduled_due_kernel[(1,)](
        steps, schedule, due, num_steps, batch_size, due.shape[1],
        LANES=triton.next_power_of_2(due.numel()), num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["max_units", "num_offsets"])
def _forced_scores_kernel(starts, due, offsets, num_units, scores, max_units, num_offsets, stretch, TILE: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    if tl.load(due + head).to(tl.int32) > 0:
        count = tl.load(num_units + head)
        offsets += head * num_offsets
        num_tokens = tl.maximum((tl.load(offsets + count) - tl.load(offsets)).to(tl.int64), 1)
        start = (tl.load(starts + head) + stretch // num_tokens) & _MASK
        tl.debug_barrier()  # every warp has read where the head stood before one moves it
        tl.store(starts + head, start)
        for first in range(0, max_units, TILE):
            units = first + tl.arange(0, TILE)
            place = ((units + head * _HEAD_STEP) * _MIX_FIRST + _MIX_OFFSET) & _MASK
            place = place ^ (place >> 11)
            place = (place * _MIX_SECOND) & _MASK
            place = place ^ (place >> 9)
            ahead = ((place - start) & _MASK).to(tl.float32)
            score = tl.where(units < count, -ahead, float("-inf"))
            tl.store(scores + head * max_units + units, score, mask=units < max_units)


def forced_scores_triton(
    starts: Tensor, due: Tensor, offsets: Tensor, num_units: Tensor, max_units: int, advance: int
) -> Tensor:
    """Arguments and result as in `forced_scores_reference`, all contiguous; scores are written only where due."""
    scores = torch.empty(*due.shape, max_units, dtype=torch.float32, device=due.device)
    _forced_scores_kernel[(due.numel(),)](
        starts, due.contiguous(), offsets, num_units.contiguous(), scores, max_units, offsets.shape[-1],
        advance * PLACES,  # here, because Python's numbers do not overflow
        TILE=min(2048, triton.next_power_of_2(max_units)), num_warps=8,
    )  # fmt: skip
    return scores
