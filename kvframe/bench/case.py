"""What a case of `kvframe bench kernels` is, and the sizes that all cases share."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from attrs import frozen
from torch import Tensor

Call = Callable[[], object]
Over = Literal["device", "link"]

# Calls of every input in one graph.
REPEATS = 8


@frozen(kw_only=True)
class KernelSizes:
    """A layer of a model and its policy; the defaults are Llama-3.1-8B with LouisKV at 128K."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    context: int = 131072
    unit_size: int = 16
    token_budget: int = 1024
    sink_size: int = 64
    window_size: int = 256
    max_segment: int = 64
    miss: float = 0.3
    oversample: int = 16
    """Candidates of a key sketch are so many times the budget."""
    sketch_bits: int = 4
    """Of a number in it."""
    num_slots: int = 2048
    """Of attention alone."""
    attention_batches: tuple[int, ...] = (1, 8)
    prompts: tuple[int, ...] = (8192, 32768, 131072)
    """Of k-means."""
    block_size: int = 8192
    """Tokens clustered at once."""
    num_iterations: int = 10
    spread: int = 128 * 2**20
    """Bytes of inputs that a case goes through in turn, so that they are not in the cache when they come again."""

    @property
    def num_units(self) -> int:
        """Units of the context."""
        return self.context // self.unit_size

    @property
    def heads(self) -> tuple[int, int]:
        """[B, H] of one sequence."""
        return 1, self.num_kv_heads

    def random(self, *shape: int) -> Tensor:
        """Normal numbers in the dtype, on the device."""
        return torch.randn(shape, device=self.device).to(self.dtype)

    def flags(self, value: bool) -> Tensor:
        """bool [B, H]."""
        return torch.full(self.heads, value, dtype=torch.bool, device=self.device)

    def copies(self, num_bytes: int) -> int:
        """How many inputs of so many bytes a case needs."""
        return max(2, min(32, math.ceil(self.spread / num_bytes)))


@frozen(kw_only=True, eq=False)
class Case:
    """One operation in one state."""

    op: str
    state: str
    """What is due, or how large it is."""
    calls: list[Call]
    """The operation on one input after the other."""
    num_bytes: int = 0
    """That it has to move; 0 where nothing has to be."""
    over: Over = "device"
    in_graph: bool = True
    """Whether it is part of a decode step."""
    settle: int = 2
    """Replays until its state is that of a long run."""


def unit_offsets(sizes: KernelSizes) -> Tensor:
    """Units of about the same size, int32 [B, H, U + 2]; together no more than the context."""
    low, high = max(1, sizes.unit_size // 2), sizes.unit_size
    drawn = torch.randint(low, high + 1, (*sizes.heads, sizes.num_units + 1), device=sizes.device)
    drawn[..., -1] = 0
    return torch.cat([drawn.new_zeros(*sizes.heads, 1), drawn.cumsum(-1)], -1).int()


def each(call: Callable[[int], Call], copies: int) -> list[Call]:
    """What is called on so many inputs."""
    return [call(number) for number in range(copies)]


def due_or_not(op: str, calls: Callable[[bool], list[Call]], num_bytes: int) -> list[Case]:
    """A case for a step at which nothing is due, and one for a step at which everything is."""
    return [
        Case(op=op, state="nothing due", calls=calls(False)),
        Case(op=op, state="due", calls=calls(True), num_bytes=num_bytes),
    ]
