"""Rows from the pool into slots, and a new token's row into the pool."""

import torch
from torch import Tensor

from kvframe_kernels.dispatch import Backend, KernelError, choose, float_reason, is_debug, width_reason
from kvframe_kernels.gather_kv.reference import gather_kv_reference, store_token_reference

__all__ = ["gather_kv", "gather_kv_reference", "store_token", "store_token_reference"]

# Kernels move vectors of so many bytes.
_VECTOR = 16


def gather_kv(
    pool: Tensor,
    incoming: Tensor,
    first_row: int,
    k_slots: Tensor,
    v_slots: Tensor,
    *,
    backend: Backend = "auto",
    num_blocks: int | None = None,
) -> None:
    """`gather_kv_reference`, by the chosen backend.

    A kernel reads the pool where it lies, in pinned host memory or on the slots' device. It needs no host sync and may
    be captured in a CUDA graph once it has been called: the first call compiles it.
    num_blocks: how many thread blocks a kernel uses; None for as many as keep the link to the host busy.
    """
    reason = (
        float_reason(pool, k_slots, v_slots)
        or width_reason(k_slots.shape[-1], v_slots.shape[-1])
        or _dtype_reason(pool, k_slots, v_slots)
        or _pool_reason(pool, k_slots.device, backend)
        or _layout_reason("k_slots", k_slots)
        or _layout_reason("v_slots", v_slots)
        or _rows_reason("incoming", incoming, k_slots.device)
    )
    if is_debug():
        _check_rows("gather_kv", incoming)
    kernel = choose("gather_kv", k_slots, backend, reason, kernels=("cuda", "triton"))
    if kernel == "reference":
        gather_kv_reference(pool, incoming, first_row, k_slots, v_slots)
        return
    if num_blocks is not None and num_blocks < 1:
        raise ValueError(f"num_blocks is {num_blocks}; expected at least 1")
    head_dim = k_slots.shape[-1]
    _check_shape("k_slots", k_slots, *incoming.shape, head_dim)
    _check_shape("v_slots", v_slots, *incoming.shape, pool.shape[3] - head_dim)
    _check_shape("the pool", pool, *incoming.shape[:2], *pool.shape[2:])
    if incoming.numel() == 0:
        return
    if kernel == "cuda":
        from kvframe_kernels.gather_kv.cuda_kernel import gather_kv_cuda

        gather_kv_cuda(pool, incoming, first_row, k_slots, v_slots, num_blocks)
    else:
        from kvframe_kernels.gather_kv.triton_kernel import gather_kv_triton

        gather_kv_triton(pool, incoming, first_row, k_slots, v_slots, num_blocks)


def store_token(
    pool: Tensor, rows: Tensor, first_row: int, keys: Tensor, values: Tensor, *, backend: Backend = "auto"
) -> None:
    """`store_token_reference`, by the chosen backend.

    The kernel writes straight into the pool, in pinned host memory or on the device of the keys, without a host sync:
    the host may read a row once the device has been waited for.
    """
    reason = (
        float_reason(pool, keys, values)
        or width_reason(keys.shape[-1], values.shape[-1])
        or _dtype_reason(pool, keys, values)
        or _pool_reason(pool, keys.device, backend)
        or _rows_reason("rows", rows, keys.device)
    )
    for name, tensor in (("keys", keys), ("values", values)):
        if tensor.stride(-1) != 1:
            reason = reason or f"the last dimension of {name} is not contiguous"
    if is_debug():
        _check_rows("store_token", rows)
    if choose("store_token", keys, backend, reason, kernels=("triton",)) == "reference":
        store_token_reference(pool, rows, first_row, keys, values)
        return
    head_dim = keys.shape[-1]
    _check_shape("keys", keys, *rows.shape, head_dim)
    _check_shape("values", values, *rows.shape, pool.shape[3] - head_dim)
    _check_shape("the pool", pool, *rows.shape, *pool.shape[2:])
    if rows.numel() == 0:
        return
    from kvframe_kernels.gather_kv.triton_kernel import store_token_triton

    store_token_triton(pool, rows, first_row, keys, values)


def _dtype_reason(pool: Tensor, *others: Tensor) -> str | None:
    """Why kernels do not serve these dtypes together."""
    for other in others:
        if other.dtype != pool.dtype:
            return f"the pool is {pool.dtype} and its counterpart {other.dtype}; kernels move bytes as they are"
    return None


def _pool_reason(pool: Tensor, device: torch.device, backend: Backend) -> str | None:
    """Why kernels on a device do not reach a pool."""
    reason = _layout_reason("the pool", pool)
    if pool.device == device:
        return reason
    if pool.device.type != "cpu":
        return f"the pool lies on {pool.device} and the slots on {device}"
    if not pool.is_pinned():
        unpinned = "the pool is not pinned, and the device reaches page-locked host memory only (pin_memory=True)"
        if is_debug() and backend != "reference":
            raise KernelError(unpinned)
        return unpinned
    return reason


def _layout_reason(name: str, tensor: Tensor) -> str | None:
    """Why kernels do not serve a layout: rows [B, H, N, width] must be dense, and every head start on a vector."""
    num_batches, num_heads, num_rows, width = tensor.shape
    if tensor.stride(3) != 1 or (num_rows > 1 and tensor.stride(2) != width):
        return f"the rows of a head of {name} are not contiguous"
    size = tensor.element_size()
    strides = (tensor.stride(0) if num_batches > 1 else 0, tensor.stride(1) if num_heads > 1 else 0)
    if any(place % _VECTOR for place in (tensor.data_ptr(), strides[0] * size, strides[1] * size)):
        return f"a head of {name} does not start at a multiple of {_VECTOR} bytes"
    return None


def _rows_reason(name: str, rows: Tensor, device: torch.device) -> str | None:
    """Why kernels on a device do not read these row numbers."""
    if rows.dtype != torch.int64 or rows.device != device:
        return f"{name} is {rows.dtype} on {rows.device}; expected int64 on {device}"
    return None


def _check_shape(name: str, tensor: Tensor, *expected: int) -> None:
    """A kernel takes sizes on trust, and would leave a buffer that is smaller."""
    if tensor.shape != expected:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")


def _check_rows(op: str, rows: Tensor) -> None:
    """Debug mode: -1 is the only row below zero. The host waits for the device, which a capture does not allow."""
    if rows.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if bool((rows < -1).any()):
        raise KernelError(f"{op} was given row {int(rows.min())}; rows count from 0, and -1 stands for none")
