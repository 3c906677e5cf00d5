"""`kmeans` and `write_in_order` as Triton kernels."""

# Triton reads a kernel's source; Python types mean nothing in it.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvframe_kernels.kmeans.reference import cut_into_units


@triton.jit
def _normalise_kernel(
    keys_ptr, mean_ptr, points_ptr, stride_keys_n, stride_keys_t, num_tokens, num_tiles,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    problem = program // num_tiles
    tokens = (program % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, WIDTH_PAD)
    inside = (tokens < num_tokens)[:, None] & (columns < WIDTH)[None, :]
    keys_ptr += problem * stride_keys_n
    keys = tl.load(keys_ptr + tokens[:, None] * stride_keys_t + columns[None, :], mask=inside, other=0.0)
    mean = tl.load(mean_ptr + problem * WIDTH + columns, mask=columns < WIDTH, other=0.0)
    points = tl.where(inside, keys.to(tl.float32) - mean[None, :], 0.0)
    length = tl.sqrt(tl.sum(points * points, 1))
    points = points / tl.maximum(length, 1e-12)[:, None]
    points_ptr += problem * num_tokens * WIDTH
    tl.store(
        points_ptr + tokens[:, None] * WIDTH + columns[None, :], points.to(points_ptr.dtype.element_ty), mask=inside
    )


# Nothing is known about `stride_sums_k`, so that neighbouring threads, not one thread, take neighbouring numbers of
# a row of sums: a warp's additions then go to memory in whole lines.
@triton.jit(do_not_specialize=["stride_sums_k"])
def _assign_kernel(
    points_ptr, centroids_ptr, sums_ptr, assignment_ptr, stride_sums_k, num_tokens, num_clusters, num_tiles, scale,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    problem = program // num_tiles
    tokens = (program % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, WIDTH_PAD)
    inside = (tokens < num_tokens)[:, None] & (columns < WIDTH)[None, :]
    points_ptr += problem * num_tokens * WIDTH
    centroids_ptr += problem * num_clusters * WIDTH
    points = tl.load(points_ptr + tokens[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)

    # Every column keeps its own best over the tiles; a reduction along the rows in every step would cost more than
    # the product. Columns behind the last cluster stand for it once more.
    clusters = tl.arange(0, BLOCK_K)
    best = tl.full([BLOCK_T, BLOCK_K], float("-inf"), dtype=tl.float32)
    winner = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    for first in range(0, num_clusters, BLOCK_K):
        rows = tl.minimum(first + clusters, num_clusters - 1).to(tl.int64)
        centroids = tl.load(
            centroids_ptr + rows[:, None] * WIDTH + columns[None, :], mask=(columns < WIDTH)[None, :], other=0.0
        )
        scores = tl.dot(points, tl.trans(centroids), input_precision="ieee")
        # Strictly, so that of equal ones the earlier tile wins; a score that is not a number never does.
        better = scores > best
        best = tl.where(better, scores, best)
        winner = tl.where(better, first, winner)
    top = tl.max(best, 1)
    # Of equal ones the lowest cluster; without any score, of a key that is not finite, the first.
    winner = tl.minimum(winner + clusters[None, :], num_clusters - 1)
    winner = tl.where(best == top[:, None], winner, num_clusters)
    assignment = tl.min(winner, 1)
    tl.store(assignment_ptr + problem * num_tokens + tokens, assignment, mask=tokens < num_tokens)

    if ACCUMULATE:
        # Integers add up to the same sum in any order, so the same keys always give the same clusters; additions of
        # floating-point numbers would not. The scale leaves room for all tokens in one cluster.
        # The points come again, few columns at a time: they need no registers in the loop above.
        targets_ptr = sums_ptr + (problem * num_clusters + assignment) * stride_sums_k
        for left in range(0, WIDTH, BLOCK_D):
            part = left + tl.arange(0, BLOCK_D)
            inside_part = (tokens < num_tokens)[:, None] & (part < WIDTH)[None, :]
            members = tl.load(points_ptr + tokens[:, None] * WIDTH + part[None, :], mask=inside_part, other=0.0)
            fixed = tl.floor(members.to(tl.float32) * scale + 0.5).to(tl.int32)
            tl.atomic_add(targets_ptr[:, None] + part[None, :], fixed, mask=inside_part, sem="relaxed")


@triton.jit
def _update_kernel(
    sums_ptr, centroids_ptr, num_rows, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, WIDTH_PAD)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    offsets = rows[:, None] * WIDTH + columns[None, :]
    # A direction: the scale of the sums does not matter.
    sums = tl.load(sums_ptr + offsets, mask=inside, other=0).to(tl.float32)
    length = tl.sqrt(tl.sum(sums * sums, 1))
    centroids = sums / tl.maximum(length, 1.0)[:, None]
    tl.store(
        centroids_ptr + offsets, centroids.to(centroids_ptr.dtype.element_ty), mask=inside & (length > 0.0)[:, None]
    )
    tl.debug_barrier()  # every thread has read its sums before one clears them
    tl.store(sums_ptr + offsets, tl.zeros([BLOCK_K, WIDTH_PAD], dtype=tl.int32), mask=inside)


def kmeans_triton(
    keys: Tensor, num_clusters: int, num_iterations: int, max_cluster_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and result as in `kmeans_reference`; points and centroids have the keys' dtype.

    keys: [N, T, D], any strides but the last, which is 1.
    """
    num_problems, num_tokens, width = keys.shape
    width_pad = triton.next_power_of_2(width)
    mean = torch.mean(keys, 1, dtype=torch.float32)
    points = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    block = 32
    num_tiles = triton.cdiv(num_tokens, block)
    _normalise_kernel[(num_problems * num_tiles,)](
        keys, mean, points, keys.stride(0), keys.stride(1), num_tokens, num_tiles,
        WIDTH=width, WIDTH_PAD=width_pad, BLOCK_T=block, num_warps=4,
    )  # fmt: skip

    seeds = torch.arange(num_clusters, device=keys.device) * num_tokens // num_clusters
    centroids = points[:, seeds].contiguous()
    sums = torch.zeros(centroids.shape, dtype=torch.int32, device=keys.device)
    assignment = torch.empty(num_problems, num_tokens, dtype=torch.int32, device=keys.device)
    # float32 does not go through the tensor cores: small tiles, or the registers run over.
    single = keys.dtype == torch.float32
    block, block_k = (64, 32) if single else (128, 64)
    num_tiles = triton.cdiv(num_tokens, block)
    scale = 2.0 ** (30 - (num_tokens - 1).bit_length())
    for i in range(num_iterations + 1):
        if i:
            _update_kernel[(triton.cdiv(num_problems * num_clusters, 16),)](
                sums, centroids, num_problems * num_clusters, WIDTH=width, WIDTH_PAD=width_pad, BLOCK_K=16, num_warps=4
            )
        _assign_kernel[(num_problems * num_tiles,)](
            points, centroids, sums, assignment, width, num_tokens, num_clusters, num_tiles, scale,
            WIDTH=width, WIDTH_PAD=width_pad, BLOCK_T=block, BLOCK_K=block_k,
            BLOCK_D=min(32, width_pad), ACCUMULATE=i < num_iterations,
            num_warps=4 if single else 8, num_stages=2 if single else 3,
        )  # fmt: skip
    return cut_into_units(assignment, num_clusters, max_cluster_size)


@triton.jit
def _write_in_order_kernel(
    keys_ptr, values_ptr, order_ptr, out_ptr,
    stride_keys_n, stride_keys_t, stride_values_n, stride_values_t, stride_order_n, stride_order_t,
    stride_out_n, stride_out_t, num_rows, num_tokens, num_tiles,
    KEY_WIDTH: tl.constexpr, KEY_PAD: tl.constexpr, VALUE_WIDTH: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    problem = program // num_tiles
    rows = (program % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    order_ptr += problem * stride_order_n
    tokens = tl.load(order_ptr + rows * stride_order_t, mask=rows < num_rows, other=-1)
    valid = (tokens >= 0) & (tokens < num_tokens)
    out_ptr += problem * stride_out_n

    columns = tl.arange(0, KEY_PAD)
    inside = valid[:, None] & (columns < KEY_WIDTH)[None, :]
    keys_ptr += problem * stride_keys_n
    keys = tl.load(keys_ptr + tokens[:, None] * stride_keys_t + columns[None, :], mask=inside, other=0.0)
    columns_v = tl.arange(0, VALUE_PAD)
    inside_v = valid[:, None] & (columns_v < VALUE_WIDTH)[None, :]
    values_ptr += problem * stride_values_n
    values = tl.load(values_ptr + tokens[:, None] * stride_values_t + columns_v[None, :], mask=inside_v, other=0.0)

    out_ptrs = out_ptr + rows[:, None] * stride_out_t
    tl.store(out_ptrs + columns[None, :], keys.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptrs + KEY_WIDTH + columns_v[None, :], values.to(out_ptr.dtype.element_ty), mask=inside_v)


def write_in_order_triton(keys: Tensor, values: Tensor, order: Tensor, out: Tensor) -> None:
    """Arguments as in `write_in_order_reference`; the last stride of keys, values and out is 1."""
    num_problems, num_tokens, key_width = keys.shape
    value_width = values.shape[-1]
    num_rows = min(order.shape[1], out.shape[1])
    if num_problems * num_rows == 0:
        return
    block = 32
    num_tiles = triton.cdiv(num_rows, block)
    _write_in_order_kernel[(num_problems * num_tiles,)](
        keys, values, order, out,
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), order.stride(0), order.stride(1),
        out.stride(0), out.stride(1), num_rows, num_tokens, num_tiles,
        KEY_WIDTH=key_width, KEY_PAD=triton.next_power_of_2(key_width),
        VALUE_WIDTH=value_width, VALUE_PAD=triton.next_power_of_2(value_width), BLOCK_T=block,
        num_warps=4,
    )  # fmt: skip
