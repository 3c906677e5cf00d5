"""Plain torch definitions of `gather_kv` and `store_token`."""

import torch
from torch import Tensor


def gather_kv_reference(pool: Tensor, incoming: Tensor, first_row: int, k_slots: Tensor, v_slots: Tensor) -> None:
    """Copy the rows that `incoming` names out of one slab of the pool into their slots, in place.

    pool: [B, H, R, D + Dv], K and V of a token adjacent, on the host or the device; it holds the rows from `first_row`
    on.
    incoming: int64 [B, H, C], the row for each slot; a row outside this slab (-1 included) leaves its slot as it is.
    k_slots: [B, H, C, D], v_slots: [B, H, C, Dv]: views of the resident slots.
    """
    local = incoming - first_row
    batch, head, slot = ((local >= 0) & (local < pool.shape[2])).nonzero(as_tuple=True)
    rows = local[batch, head, slot]
    moved = pool[batch.to(pool.device), head.to(pool.device), rows.to(pool.device)].to(k_slots.device)
    head_dim = k_slots.shape[-1]
    k_slots[batch, head, slot] = moved[:, :head_dim]
    v_slots[batch, head, slot] = moved[:, head_dim:]


def store_token_reference(pool: Tensor, rows: Tensor, first_row: int, keys: Tensor, values: Tensor) -> None:
    """Write one token of every head to its own row of one slab of the pool, in place.

    pool: [B, H, R, D + Dv], the rows from `first_row` on, on the host or the device.
    rows: int64 [B, H]; a row outside this slab (-1 included) writes nothing.
    keys: [B, H, D], values: [B, H, Dv].
    """
    local = rows - first_row
    batch, head = ((local >= 0) & (local < pool.shape[2])).nonzero(as_tuple=True)
    token = torch.cat([keys[batch, head], values[batch, head]], -1)
    place = (batch.to(pool.device), head.to(pool.device), local[batch, head].to(pool.device))
    pool[place] = token.to(pool.device)
