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


@triton.jit
def _assign_kernel(
    points_ptr, centroids_ptr, assignment_ptr, counts_ptr, ranks_ptr, num_tokens, num_clusters, num_tiles,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    problem = (program // num_tiles).to(tl.int64)
    tokens = (program % num_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
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
    offsets = problem * num_tokens + tokens
    tl.store(assignment_ptr + offsets, assignment, mask=tokens < num_tokens)

    if COUNT:
        # The token's place among the members of its cluster. Which token comes first is not the same in every run,
        # and need not be: the members are added up as integers.
        counts_ptr += problem * num_clusters
        rank = tl.atomic_add(counts_ptr + assignment, 1, mask=tokens < num_tokens, sem="relaxed")
        tl.store(ranks_ptr + offsets, rank, mask=tokens < num_tokens)


@triton.jit
def _place_kernel(
    assignment_ptr, ranks_ptr, counts_ptr, starts_ptr, members_ptr, num_tokens, num_clusters, num_tiles,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    problem = (program // num_tiles).to(tl.int64)
    tokens = (program % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < num_tokens
    offset = problem * num_tokens
    # Before the barrier, so that they arrive while the counts are summed.
    assignment = tl.load(assignment_ptr + offset + tokens, mask=inside, other=0)
    rank = tl.load(ranks_ptr + offset + tokens, mask=inside, other=0)

    # All programs of a problem sum its counts and write the same numbers, so that none waits for another.
    counts_ptr += problem * num_clusters
    starts_ptr += problem * num_clusters
    total = 0
    for first in range(0, num_clusters, BLOCK_K):
        clusters = first + tl.arange(0, BLOCK_K)
        counts = tl.load(counts_ptr + clusters, mask=clusters < num_clusters, other=0)
        tl.store(starts_ptr + clusters, total + tl.cumsum(counts, 0) - counts, mask=clusters < num_clusters)
        total += tl.sum(counts, 0)
    tl.debug_barrier()  # a thread reads what others of its program have written
    start = tl.load(starts_ptr + assignment, mask=inside, other=0)
    tl.store(members_ptr + offset + start + rank, tokens, mask=inside)


@triton.jit
def _update_kernel(
    points_ptr, members_ptr, starts_ptr, counts_ptr, centroids_ptr, num_tokens, num_clusters, scale,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)  # a cluster of a problem
    problem = (program // num_clusters).to(tl.int64)
    start = tl.load(starts_ptr + program)
    count = tl.load(counts_ptr + program)
    points_ptr += problem * num_tokens * WIDTH
    members_ptr += problem * num_tokens + start
    slots = tl.arange(0, BLOCK_T)
    columns = tl.arange(0, WIDTH_PAD)

    # Integers add up to the same sum in any order, so the same keys always give the same clusters; additions of
    # floating-point numbers would not. The scale leaves room for all tokens in one cluster.
    # Adding 1.5 * 2**23 leaves the rounded number in the low bits of a float32; instructions that convert are slow.
    sums = tl.zeros([WIDTH_PAD], dtype=tl.int32)
    tokens = tl.load(members_ptr + slots, mask=slots < count, other=0)
    for first in range(0, count, BLOCK_T):
        inside = (first + slots < count)[:, None] & (columns < WIDTH)[None, :]
        offsets = tokens.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        points = tl.load(points_ptr + offsets, mask=inside, other=0.0)
        # The next members' numbers come while these members' points do.
        tokens = tl.load(members_ptr + first + BLOCK_T + slots, mask=first + BLOCK_T + slots < count, other=0)
        fixed = (points.to(tl.float32) * scale + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        sums += tl.sum(fixed, 0)

    # A direction: the scale of the sums does not matter. An empty cluster keeps its own.
    direction = sums.to(tl.float32)
    length = tl.sqrt(tl.sum(direction * direction, 0))
    if length > 0.0:
        centroid = (direction / tl.maximum(length, 1.0)).to(centroids_ptr.dtype.element_ty)
        tl.store(centroids_ptr + program.to(tl.int64) * WIDTH + columns, centroid, mask=columns < WIDTH)
    tl.debug_barrier()  # every thread has read the count before one clears it for the next iteration
    tl.store(counts_ptr + program, 0)


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
    assignment = torch.empty(num_problems, num_tokens, dtype=torch.int32, device=keys.device)
    ranks, members = torch.empty_like(assignment), torch.empty_like(assignment)
    counts = torch.zeros(num_problems, num_clusters, dtype=torch.int32, device=keys.device)
    starts = torch.empty_like(counts)
    # float32 does not go through the tensor cores: small tiles, or the registers run over.
    single = keys.dtype == torch.float32
    block, block_k = (64, 32) if single else (128, 64)
    num_tiles = triton.cdiv(num_tokens, block)
    place_block = 512
    num_place_tiles = triton.cdiv(num_tokens, place_block)
    # Room for all tokens in one cluster, and for a point in the low 23 bits of a float32.
    scale = 2.0 ** min(21, 30 - (num_tokens - 1).bit_length())
    for i in range(num_iterations + 1):
        _assign_kernel[(num_problems * num_tiles,)](
            points, centroids, assignment, counts, ranks, num_tokens, num_clusters, num_tiles,
            WIDTH=width, WIDTH_PAD=width_pad, BLOCK_T=block, BLOCK_K=block_k, COUNT=i < num_iterations,
            num_warps=4 if single else 8, num_stages=2 if single else 3,
        )  # fmt: skip
        if i == num_iterations:
            break
        _place_kernel[(num_problems * num_place_tiles,)](
            assignment, ranks, counts, starts, members, num_tokens, num_clusters, num_place_tiles,
            BLOCK_T=place_block, BLOCK_K=512, num_warps=4,
        )  # fmt: skip
        # A warp for every 256 bytes of a row: clusters are small, and most of their programs wait for memory.
        _update_kernel[(num_problems * num_clusters,)](
            points, members, starts, counts, centroids, num_tokens, num_clusters, scale,
            WIDTH=width, WIDTH_PAD=width_pad, BLOCK_T=32,
            num_warps=max(1, width_pad * keys.element_size() // 256), num_stages=1,
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
