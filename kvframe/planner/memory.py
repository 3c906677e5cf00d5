"""How many bytes a model, a policy and a context take, item by item."""

import torch
from attrs import frozen

from kvframe.composition import Policy
from kvframe.memory.index import RowIndex, UnitIndex
from kvframe.memory.ledger import NUM_COUNTS
from kvframe.planner.shape import ModelShape
from kvframe.planner.units import UnitCount
from kvframe.runtime import host_bytes_needed

FIXED_BYTES = int(0.7 * 2**30)
"""The CUDA context, cuBLAS workspaces, compiled kernels and what the allocator cannot use: taken as a constant."""
_FEED_FORWARD_FACTOR = 4  # of hidden_size, where the width of the feed-forward part is unknown
# Buffers for one sequence's KV of one layer: out, one is filled while others travel; in, one is used while one arrives.
_SEND_BUFFERS = 3
_RECEIVE_BUFFERS = 2


@frozen(kw_only=True)
class MemoryPlan:
    """Bytes by what they are for; all items on the GPU are taken as held at the same time."""

    weights: int
    dense_kv: int
    """Whole KV of the policy's dense layers."""
    slots: int
    """Sinks, resident rows and ring of all retrieval layers."""
    index: int
    """Summaries, unit boundaries and counters of all retrieval layers."""
    pool_on_gpu: int
    """All KV of the retrieval layers, under a transfer that keeps it on the device."""
    staging: int
    """Buffers for one layer's KV on its way while the prompt is read."""
    activations: int
    """Of one chunk of the prompt; an estimate."""
    logits: int
    """Of one position, and their float32 copy."""
    fixed: int = FIXED_BYTES
    pool_on_host: int
    """Pinned memory for all KV of the retrieval layers."""
    positions_on_host: int
    """Which token lies in each row."""

    @property
    def gpu_bytes(self) -> int:
        """Everything on the GPU."""
        return sum(self.gpu_items.values())

    @property
    def host_bytes(self) -> int:
        """Everything on the host."""
        return self.pool_on_host + self.positions_on_host

    @property
    def gpu_items(self) -> dict[str, int]:
        """What is on the GPU, by name."""
        return {
            "weights": self.weights,
            "dense_kv": self.dense_kv,
            "slots": self.slots,
            "index": self.index,
            "pool_on_gpu": self.pool_on_gpu,
            "staging": self.staging,
            "activations": self.activations,
            "logits": self.logits,
            "fixed": self.fixed,
        }


def plan_memory(
    shape: ModelShape,
    policy: Policy,
    *,
    context: int,
    max_new_tokens: int,
    batch_size: int,
    chunk: int,
    units: UnitCount | None = None,
) -> MemoryPlan:
    """Memory for prompts of `context` tokens, read in chunks of `chunk`, and `max_new_tokens` more.

    units: counts the prompt's units; made from the policy without it. Numbers are expected to be checked.
    """
    retrieval_layers = [layer for layer in shape.retrieval_layers if not policy.is_dense(layer)]
    retrieving = len(retrieval_layers)
    dense = len(shape.retrieval_layers) - retrieving
    num_rows = context + max_new_tokens
    layout = shape.layout(batch_size)
    pool = policy.transfer.host_bytes(layout, num_rows)
    index = 0
    if retrieving:
        num_units = (units or UnitCount(policy)).most(context, max_new_tokens, chunk)
        index = _layer_index_bytes(shape, policy, num_rows, num_units, batch_size)
    kv = shape.layer_kv_bytes(num_rows, batch_size)
    return MemoryPlan(
        weights=shape.weight_bytes,
        dense_kv=dense * kv,
        slots=sum(_layer_slot_bytes(shape, policy, batch_size, layer) for layer in retrieval_layers),
        index=retrieving * index,
        # What a transfer does not keep on the host it keeps on the device.
        pool_on_gpu=0 if pool else retrieving * kv,
        staging=_staging_bytes(shape, context, max_new_tokens, chunk) if retrieving else 0,
        activations=_activation_bytes(shape, batch_size, chunk),
        logits=batch_size * shape.vocab_size * (shape.dtype.itemsize + torch.float32.itemsize),
        pool_on_host=retrieving * pool,
        positions_on_host=retrieving * (host_bytes_needed(layout, policy, num_rows) - pool),
    )


def _layer_slot_bytes(shape: ModelShape, policy: Policy, batch_size: int, layer_idx: int) -> int:
    """One retrieval layer's slots: K, V and bias of each, and the row in each resident one."""
    capacity = policy.selector.capacity_in(shape.layout(batch_size, layer_idx))
    num_slots = policy.sink_size + capacity + policy.window_size + policy.units.max_size
    each = num_slots * (shape.row_bytes + shape.dtype.itemsize) + capacity * torch.int64.itemsize
    return batch_size * shape.num_kv_heads * each


def _layer_index_bytes(shape: ModelShape, policy: Policy, num_rows: int, num_units: int, batch_size: int) -> int:
    """What one retrieval layer takes for finding units: for each a summary, as the scorer makes it, an offset and a
    flag; and for each row a bit, what the selector keeps of it, what the scorer notes, and whether it is left."""
    num_heads = batch_size * shape.num_kv_heads
    counters = NUM_COUNTS * torch.int64.itemsize
    boundaries = (num_units + 2) * torch.int32.itemsize + (num_units + 1) * torch.bool.itemsize
    noted = policy.scorer.num_notes * torch.float32.itemsize + policy.transfer.drops * torch.bool.itemsize
    if not policy.selector.capacity:
        return num_heads * (counters + boundaries + num_rows * noted)  # nothing can be selected, so nothing is scored
    layout = shape.layout(batch_size)
    marks = -(-num_rows // 32) * torch.int32.itemsize
    column = UnitIndex(layout, policy.scorer).nbytes()  # an empty one has a single column
    rows = RowIndex(layout, policy.selector, num_rows=0)
    kept = rows.nbytes() + num_rows * rows.row_bytes()  # an empty one has a single row
    return num_heads * (counters + boundaries + marks + num_rows * noted) + (num_units + 1) * column + kept


def _staging_bytes(shape: ModelShape, context: int, max_new_tokens: int, chunk: int) -> int:
    """Out goes one chunk; in comes all that lies before a chunk, into buffers that are sized for the whole text."""
    send = _SEND_BUFFERS * shape.layer_kv_bytes(chunk)
    return send + (_RECEIVE_BUFFERS * shape.layer_kv_bytes(context + max_new_tokens) if chunk < context else 0)


def _activation_bytes(shape: ModelShape, batch_size: int, chunk: int) -> int:
    """What a decoder layer holds at its fullest, in widths a token: some of the hidden state (residual, norm, output),
    three of the feed-forward part (gate, up, product), and queries, keys and values."""
    intermediate = shape.intermediate_size or _FEED_FORWARD_FACTOR * shape.hidden_size
    heads = (shape.num_qo_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return batch_size * chunk * (6 * shape.hidden_size + 3 * intermediate + heads) * shape.dtype.itemsize
