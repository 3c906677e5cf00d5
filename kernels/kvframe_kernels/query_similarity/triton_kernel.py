"""`query_turned` as one Triton kernel: a program a sequence, or a KV head of one."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _query_turned_kernel(
    query, previous, compared, first, due, tau,
    query_batch, query_head, compared_batch, compared_head,
    num_qo_heads, num_kv_heads, width,
    num_heads, num_firsts,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, FIRSTS: tl.constexpr,
):  # fmt: skip
    # num_heads query heads and num_firsts KV heads are this program's: those of a group, or all of a sequence.
    program = tl.program_id(0).to(tl.int64)
    programs_a_row = num_kv_heads // num_firsts
    batch = program // programs_a_row
    part = program % programs_a_row
    heads = tl.arange(0, HEADS)
    columns = tl.arange(0, WIDTH)
    exists = heads < num_heads
    inside = exists[:, None] & (columns < width)[None, :]
    heads = heads + part * num_heads
    place = batch * query_batch + heads[:, None] * query_head + columns[None, :]
    new = tl.load(query + place, mask=inside, other=0.0)
    place = batch * compared_batch + heads[:, None] * compared_head + columns[None, :]
    old = tl.load(compared + place, mask=inside, other=0.0).to(tl.float32)
    place = (batch * num_qo_heads + heads[:, None]) * width + columns[None, :]
    tl.debug_barrier()  # `compared` may be `previous`: every warp has read before one writes
    tl.store(previous + place, new.to(previous.dtype.element_ty), mask=inside)

    new = new.to(tl.float32)
    norms = tl.maximum(tl.sqrt(tl.sum(new * new, 1)), 1e-8) * tl.maximum(tl.sqrt(tl.sum(old * old, 1)), 1e-8)
    cosine = tl.sum(new * old, 1) / norms
    # Rounding must not carry a cosine past -1, which a threshold of -1 would take for an event.
    cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
    similarity = tl.sum(tl.where(exists, cosine, 0.0), 0) / num_heads

    places = tl.arange(0, FIRSTS)
    mine = places < num_firsts
    places = batch * num_kv_heads + part * num_firsts + places
    is_first = tl.load(first + places, mask=mine, other=0).to(tl.int32)
    turned = (similarity < tau).to(tl.int32)
    tl.store(due + places, is_first + turned > 0, mask=mine)
    tl.store(first + places, is_first < 0, mask=mine)


def query_turned_triton(
    query: Tensor,
    previous: Tensor,
    first: Tensor,
    tau: float,
    num_kv_heads: int,
    per_kv_head: bool,
    turned: Tensor | None,
) -> Tensor:
    """Arguments and result as in `query_turned_reference`; `previous` and `first` are contiguous."""
    batch_size, num_qo_heads, width = query.shape
    if query.stride(-1) != 1:
        query = query.contiguous()
    compared = previous if turned is None else turned.contiguous()
    num_firsts = 1 if per_kv_head else num_kv_heads
    num_heads = num_qo_heads // num_kv_heads * num_firsts
    due = torch.empty_like(first)
    _query_turned_kernel[(batch_size * (num_kv_heads // num_firsts),)](
        query, previous, compared, first, due, float(tau),
        query.stride(0), query.stride(1), compared.stride(0), compared.stride(1),
        num_qo_heads, num_kv_heads, width,
        num_heads, num_firsts,
        HEADS=triton.next_power_of_2(num_heads), WIDTH=triton.next_power_of_2(width),
        FIRSTS=triton.next_power_of_2(num_firsts),
        num_warps=8,
    )  # fmt: skip
    return due
