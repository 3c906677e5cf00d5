"""How long the prompt and a step will take: estimates from a few constants, which stand at the top."""

from attrs import frozen

from kvframe.composition import Policy
from kvframe.planner.device import Device
from kvframe.planner.memory import MemoryPlan
from kvframe.planner.shape import ModelShape
from kvframe.stages import EveryStep, FixedStride, Never, Once

PREFILL_EFFICIENCY = 0.55
"""Share of the matmul rate that reading a prompt reaches. Plain prefill of an 8B model on an H200 was measured at 0.73
to 0.82; the rest is left for cutting units, for storing, and for smaller devices."""
STEP_OVERHEAD = 1.35
"""A decode step of a captured and compiled graph over the time of reading the weights once, as measured for an 8B model
on an H200. Without a captured graph a step takes several times that, most of it Python."""
LAYER_SECONDS = 25e-6
"""What trigger, ledger and append of one retrieval layer add to a captured step, whether it retrieves or not."""
RETRIEVAL_RATE = 0.07
"""Share of steps at which a layer selects anew, where the trigger decides by data."""
MISS_RATE = 0.3
"""Share of a selection that is not resident yet and has to come from the pool."""
UNIT_ROW_EFFICIENCY = 0.9
"""Share of the link's bandwidth that a gather of unit-contiguous rows of 4 KB and more reaches."""


@frozen(kw_only=True)
class SpeedPlan:
    """Predicted times in seconds."""

    prefill_compute: float
    """Arithmetic of the whole prompt."""
    prefill_waiting: float
    """Time in which the link is slower than the arithmetic it should hide behind."""
    step_weights: float
    """Of one decode step: reading the weights, with the overhead of a step; or the arithmetic, for large batches."""
    step_attention: float
    """Reading slots and dense layers' KV."""
    step_layers: float
    """What the retrieval layers add at every step."""
    step_retrieval: float
    """Scoring and recalling, averaged over steps."""
    retrieval_rate: float
    """The share of steps at which a layer selects that this was computed with."""
    batch_size: int

    @property
    def time_to_first_token(self) -> float:
        """Seconds for the whole prompt."""
        return self.prefill_compute + self.prefill_waiting

    @property
    def step(self) -> float:
        """Seconds for one token of every sequence."""
        return self.step_weights + self.step_attention + self.step_layers + self.step_retrieval

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together, after the first token."""
        return self.batch_size / self.step


def plan_speed(
    shape: ModelShape,
    policy: Policy,
    device: Device,
    memory: MemoryPlan,
    *,
    context: int,
    max_new_tokens: int,
    batch_size: int,
    chunk: int,
    retrieval_rate: float = RETRIEVAL_RATE,
) -> SpeedPlan:
    """Times of a request whose memory is `memory`; numbers are expected to be checked.

    retrieval_rate: used where the trigger decides by data; the others' rates follow from the policy.
    """
    retrieving = sum(not policy.is_dense(layer) for layer in shape.retrieval_layers)
    crosses_link = memory.pool_on_host > 0
    compute, waiting = _prefill(shape, device, context, batch_size, chunk, retrieving if crosses_link else 0)
    length = context + max_new_tokens // 2  # halfway through the output
    dense_bytes = (len(shape.retrieval_layers) - retrieving) * shape.layer_kv_bytes(length, batch_size)
    arithmetic = 2 * shape.num_parameters * batch_size / (device.matmul_flops * PREFILL_EFFICIENCY)
    rate = _rate(policy, retrieval_rate) if policy.selector.capacity and retrieving else 0.0
    missing = MISS_RATE * shape.layer_kv_bytes(min(policy.selector.capacity, length), batch_size)
    recall_bandwidth = UNIT_ROW_EFFICIENCY * device.link_bandwidth if crosses_link else device.memory_bandwidth
    return SpeedPlan(
        prefill_compute=compute,
        prefill_waiting=waiting,
        step_weights=max(STEP_OVERHEAD * memory.weights / device.memory_bandwidth, arithmetic),
        step_attention=(memory.slots + dense_bytes) / device.memory_bandwidth,
        step_layers=LAYER_SECONDS * retrieving,
        step_retrieval=rate * (memory.index / device.memory_bandwidth + retrieving * missing / recall_bandwidth),
        retrieval_rate=rate,
        batch_size=batch_size,
    )


def _prefill(
    shape: ModelShape, device: Device, context: int, batch_size: int, chunk: int, offloading: int
) -> tuple[float, float]:
    """Seconds of arithmetic, and those beyond it that the link takes; `offloading` layers store KV over the link.

    For each chunk the past of every such layer comes from the host, and its own KV goes there. The link works in both
    directions at a time, and beside the arithmetic.
    """
    # An attention score and its share of the output are a product of head_dim and one of value_dim.
    flops_a_pair = 2 * (shape.head_dim + shape.value_dim) * shape.num_qo_heads * len(shape.retrieval_layers)
    compute = waiting = 0.0
    for past in range(0, context, chunk):
        new = min(chunk, context - past)
        flops = batch_size * (2 * shape.num_parameters * new + flops_a_pair * new * (past + new / 2))
        seconds = flops / (device.matmul_flops * PREFILL_EFFICIENCY)
        link = offloading * shape.layer_kv_bytes(max(past, new), batch_size) / device.link_bandwidth
        compute += seconds
        waiting += max(0.0, link - seconds)
    return compute, waiting


def _rate(policy: Policy, otherwise: float) -> float:
    """Share of steps at which a layer of this policy selects anew."""
    trigger = policy.trigger
    if isinstance(trigger, EveryStep):
        return 1.0
    if isinstance(trigger, FixedStride):
        return 1 / trigger.stride
    return 0.0 if isinstance(trigger, Never | Once) else otherwise
