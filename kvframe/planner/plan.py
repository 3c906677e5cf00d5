"""The whole plan: does it fit, what would help, how large are the prompt's chunks, and how fast will it be?"""

from typing import Any

from attrs import asdict, frozen

from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.planner.device import Device
from kvframe.planner.memory import MemoryPlan, plan_memory
from kvframe.planner.shape import ModelShape
from kvframe.planner.speed import RETRIEVAL_RATE, SpeedPlan, plan_speed
from kvframe.planner.units import UnitCount

_CHUNKS = tuple(2**power for power in range(15, 9, -1))  # 32768 to 1024, the largest first


@frozen(kw_only=True)
class Plan:
    """What a request needs on a device, and what it may be expected to do there."""

    shape: ModelShape
    device: Device
    context: int
    """Prompt tokens of each sequence."""
    max_new_tokens: int
    batch_size: int
    chunk: int
    """Prompt tokens to read at once; `context` for the whole prompt."""
    memory: MemoryPlan
    speed: SpeedPlan
    full_cache: MemoryPlan
    """The same with all KV on the device and attended in full."""
    advice: tuple[str, ...]
    """What would help, where it does not fit."""

    @property
    def missing_bytes(self) -> int:
        """What the GPU would have to have more; 0 where it fits."""
        return max(0, self.memory.gpu_bytes - self.device.gpu_memory)

    @property
    def fits(self) -> bool:
        """Whether everything fits the GPU."""
        return self.missing_bytes == 0

    @property
    def full_cache_fits(self) -> bool:
        """Whether it would with all KV on the device."""
        return self.full_cache.gpu_bytes <= self.device.gpu_memory

    @property
    def reason(self) -> str:
        """Why it does not fit and what would help, as one sentence; empty where it fits."""
        if self.fits:
            return ""
        helps = f"; what would help: {', '.join(self.advice)}" if self.advice else ""
        return (
            f"needs {_gib(self.missing_bytes)} more on the GPU: {_gib(self.memory.gpu_bytes)} of "
            f"{_gib(self.device.gpu_memory)}{helps}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data: bytes, seconds, tokens."""
        return {
            "fits": self.fits,
            "missing_bytes": self.missing_bytes,
            "advice": list(self.advice),
            "context": self.context,
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "chunk": self.chunk,
            "shape": asdict(self.shape)
            | {
                "dtype": str(self.shape.dtype).removeprefix("torch."),
                "retrieval_layers": [*self.shape.retrieval_layers],
            },
            "device": asdict(self.device),
            "gpu": self.memory.gpu_items | {"total": self.memory.gpu_bytes},
            "host": {
                "pool": self.memory.pool_on_host,
                "positions": self.memory.positions_on_host,
                "total": self.memory.host_bytes,
            },
            "speed": asdict(self.speed)
            | {
                "time_to_first_token": self.speed.time_to_first_token,
                "step": self.speed.step,
                "tokens_per_second": self.speed.tokens_per_second,
            },
            "full_cache": {
                "fits": self.full_cache_fits,
                "kv": self.full_cache.dense_kv,
                "total": self.full_cache.gpu_bytes,
            },
        }


def plan(
    shape: ModelShape,
    policy: Policy,
    device: Device,
    *,
    context: int,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    chunk: int | None = None,
    retrieval_rate: float = RETRIEVAL_RATE,
) -> Plan:
    """Plan for `batch_size` prompts of `context` tokens and `max_new_tokens` more for each.

    chunk: prompt tokens to read at once; without it the whole prompt if its activations fit, otherwise the largest
        power of two from 32768 down to 1024 that fits, otherwise 1024.
    retrieval_rate: share of steps at which a layer selects anew, where the trigger decides by data.

    Raises ConfigError for numbers that are no request, and for a policy whose dense layers the model does not have.
    """
    for name, value in (("context", context), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        _check_count(name, value)
    if chunk is not None:
        _check_count("chunk", chunk)
    if not 0 <= retrieval_rate <= 1:
        raise ConfigError(f"retrieval_rate must lie between 0 and 1, got {retrieval_rate!r}")
    outside = [] if policy.dense_layers == "all" else [n for n in policy.dense_layers if n >= shape.num_layers]
    if outside:
        raise ConfigError(f"dense_layers names layer {outside[0]}, the model has layers 0 to {shape.num_layers - 1}")

    numbers = {"context": context, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    chosen, memory = _largest_that_fits(shape, policy, device, chunk, **numbers)
    speed = plan_speed(
        shape,
        policy,
        device,
        memory,
        chunk=chosen,
        retrieval_rate=retrieval_rate,
        **numbers,
    )
    return Plan(
        shape=shape,
        device=device,
        chunk=chosen,
        memory=memory,
        speed=speed,
        full_cache=_largest_that_fits(shape, policy.swap(dense_layers="all"), device, chunk, **numbers)[1],
        advice=_advice(memory, device, batch_size, chosen) if memory.gpu_bytes > device.gpu_memory else (),
        **numbers,
    )


def _largest_that_fits(
    shape: ModelShape,
    policy: Policy,
    device: Device,
    chunk: int | None,
    *,
    context: int,
    max_new_tokens: int,
    batch_size: int,
) -> tuple[int, MemoryPlan]:
    """The prompt tokens to read at once, and the memory that this takes; the smallest chunk where none fits."""
    units = UnitCount(policy)
    sizes = (context, *(size for size in _CHUNKS if size < context)) if chunk is None else (min(chunk, context),)
    for size in sizes:
        memory = plan_memory(
            shape,
            policy,
            context=context,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            chunk=size,
            units=units,
        )
        if memory.gpu_bytes <= device.gpu_memory:
            break
    return size, memory


def _check_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")


def _advice(memory: MemoryPlan, device: Device, batch_size: int, chunk: int) -> tuple[str, ...]:
    """What would make the plan smaller, the surest first."""
    if memory.weights + memory.fixed > device.gpu_memory:
        # Nothing about the context can help.
        return ("a smaller model or a narrower dtype",)
    found = {
        "a transfer that keeps KV on the host": memory.pool_on_gpu > 0,
        "a smaller batch": batch_size > 1,
        "fewer dense layers": memory.dense_kv > 0,
        f"smaller chunks than {chunk} tokens": chunk > min(_CHUNKS),
        "a shorter context": True,
        "a smaller model or a narrower dtype": True,
    }
    return tuple(advice for advice, applies in found.items() if applies)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
