"""`kvframe bench gather`: units out of pinned host memory by the gather kernels, against the copy engine."""

from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from kvframe.bench import Outcome
from kvframe.bench.environment import describe
from kvframe.bench.timing import time_calls, time_in_graph
from kvframe.errors import ConfigError
from kvframe.memory.pinned import pinned_empty
from kvframe_kernels.dispatch import Backend, KernelError
from kvframe_kernels.gather_kv import gather_kv

_DTYPE = torch.bfloat16
_SLAB_BYTES = 64 * 2**20


@frozen(kw_only=True)
class GatherBenchmark:
    """What to gather, and how."""

    pool_bytes: int = 4 * 2**30
    num_kv_heads: int = 8
    head_dim: int = 128
    """Width of K and of V; a token of one KV head takes 4 bytes for each in bfloat16, 512 in all at 128."""
    unit_sizes: tuple[int, ...] = (1, 4, 16, 64)
    """Tokens of a unit, which lie side by side in the pool."""
    tokens: tuple[int, ...] = (304, 1024, 8192)
    """Tokens that every KV head gathers at once, whole units of them."""
    num_blocks: tuple[int | None, ...] = (None, 12, 32, 64, 128)
    """Thread blocks; None for the kernel's own choice."""
    backends: tuple[Backend, ...] = ("cuda", "triton")
    rotations: int = 8
    """Selections that are gathered in turn."""

    def quick(self) -> "GatherBenchmark":
        """The same as a smoke run."""
        return evolve(self, pool_bytes=2**28, unit_sizes=(16,), tokens=(1024,), num_blocks=(None,))

    @property
    def row_bytes(self) -> int:
        """Of one token of one KV head."""
        return 2 * self.head_dim * _DTYPE.itemsize

    @property
    def num_rows(self) -> int:
        """Rows of a KV head in the pool. Raises ConfigError where they are fewer than a gather takes."""
        rows = self.pool_bytes // (self.num_kv_heads * self.row_bytes)
        if rows < max(self.tokens):
            raise ConfigError(
                f"a pool of {self.pool_bytes} bytes has {rows} rows for a KV head, and {max(self.tokens)} are gathered"
            )
        return rows


def draw_rows(benchmark: GatherBenchmark, unit_size: int, num_tokens: int, seed: int) -> Tensor:
    """Rows of random units, each once, int64 [1, H, whole units of num_tokens]."""
    generator = torch.Generator().manual_seed(seed)
    num_units = benchmark.num_rows // unit_size
    units = torch.stack(
        [
            torch.randperm(num_units, generator=generator)[: num_tokens // unit_size]
            for _ in range(benchmark.num_kv_heads)
        ]
    )
    return (units[..., None] * unit_size + torch.arange(unit_size)).flatten(1)[None]


def run_gather(
    benchmark: GatherBenchmark, device: torch.device, progress: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Measure every backend, unit size, amount and number of blocks; CUDA only.

    Bandwidths are bytes gathered over time inside a CUDA graph; the copy engine moves as many bytes, in one piece out
    of the same pool.
    """
    progress(f"pinning {benchmark.pool_bytes / 2**30:.1f} GiB")
    pool = _make_pool(benchmark, device)
    rows: list[dict[str, Any]] = []
    engine: dict[int, float] = {}
    for unit_size in benchmark.unit_sizes:
        for num_tokens in benchmark.tokens:
            if num_tokens < unit_size:
                continue
            drawn = [draw_rows(benchmark, unit_size, num_tokens, seed) for seed in range(benchmark.rotations)]
            num_bytes = drawn[0].numel() * benchmark.row_bytes
            if num_bytes not in engine:
                engine[num_bytes] = _time_copy(pool, num_bytes, benchmark.rotations, device)
            incoming = [one.to(device) for one in drawn]
            for backend in benchmark.backends:
                for num_blocks in benchmark.num_blocks:
                    progress(f"{backend}, units of {unit_size}, {num_tokens} tokens, {num_blocks or 'default'} blocks")
                    row: dict[str, Any] = {
                        "backend": backend,
                        "unit_tokens": unit_size,
                        "unit_bytes": unit_size * benchmark.row_bytes,
                        "num_blocks": num_blocks,
                        "bytes": num_bytes,
                    }
                    try:
                        microseconds = _time_gather(pool, incoming, backend, num_blocks)
                    except RuntimeError as error:  # a KernelError, or what a compiler says
                        empty = dict.fromkeys(("microseconds", "gb_per_s", "copy_engine_gb_per_s", "ratio"))
                        rows.append(row | empty | {"error": str(error).partition("\n")[0]})
                        continue
                    row |= {
                        "microseconds": microseconds,
                        "gb_per_s": num_bytes / microseconds / 1e3,
                        "copy_engine_gb_per_s": num_bytes / engine[num_bytes] / 1e3,
                        "ratio": engine[num_bytes] / microseconds,
                        "error": None,
                    }
                    rows.append(row)
    return Outcome(
        benchmark="gather",
        environment=describe(device),
        conditions={
            "pool_bytes": pool.nbytes,
            "dtype": "bfloat16",
            "num_kv_heads": benchmark.num_kv_heads,
            "row_bytes": benchmark.row_bytes,
            "rotations": benchmark.rotations,
        },
        rows=rows,
        notes=["ratio: bandwidth of the gather over that of the copy engine for as many bytes"],
    )


def _make_pool(benchmark: GatherBenchmark, device: torch.device) -> Tensor:
    """Random rows [1, H, R, K and V], pinned."""
    shape = (1, benchmark.num_kv_heads, benchmark.num_rows, 2 * benchmark.head_dim)
    pool = pinned_empty(shape, _DTYPE, device)
    flat = pool.view(-1)
    noise = torch.randn(_SLAB_BYTES // _DTYPE.itemsize, device=device).to(_DTYPE)
    for start in range(0, flat.numel(), noise.numel()):
        part = flat[start : start + noise.numel()]
        # Rolled, so that no two rows at a slab's distance are alike.
        part.copy_(noise.roll(start // noise.numel() * 257)[: part.numel()], non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return pool


def gather_once(pool: Tensor, incoming: Tensor, backend: Backend, num_blocks: int | None) -> tuple[Tensor, Tensor]:
    """Slots for `incoming` [1, H, C], filled: keys and values [1, H, C, D]."""
    slots = torch.empty(2, *incoming.shape, pool.shape[-1] // 2, dtype=pool.dtype, device=incoming.device)
    gather_kv(pool, incoming, 0, slots[0], slots[1], backend=backend, num_blocks=num_blocks)
    return slots[0], slots[1]


def check_gather(pool: Tensor, incoming: Tensor, keys: Tensor, values: Tensor) -> None:
    """Raise KernelError unless some of the slots hold the rows that were asked for."""
    for head in range(incoming.shape[1]):
        places = torch.linspace(0, incoming.shape[2] - 1, 16).long()
        wanted = pool[0, head, incoming[0, head].cpu()[places]]
        found = torch.cat([keys[0, head].cpu()[places], values[0, head].cpu()[places]], -1)
        if not torch.equal(wanted, found):
            raise KernelError(f"gather_kv brought other rows than it was asked for, KV head {head}")


def _time_gather(pool: Tensor, incoming: list[Tensor], backend: Backend, num_blocks: int | None) -> float:
    keys, values = gather_once(pool, incoming[0], backend, num_blocks)
    check_gather(pool, incoming[0], keys, values)

    def gather(rows: Tensor) -> Callable[[], None]:
        return lambda: gather_kv(pool, rows, 0, keys, values, backend=backend, num_blocks=num_blocks)

    return time_in_graph([gather(rows) for rows in incoming], repeats=2, replays=5)


def _time_copy(pool: Tensor, num_bytes: int, rotations: int, device: torch.device) -> float:
    """Microseconds of one copy, of several that are queued together."""
    flat = pool.view(-1).view(torch.uint8)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    step = (flat.numel() - num_bytes) // max(1, rotations - 1)

    def copy_all() -> None:
        for number in range(rotations):
            target.copy_(flat[number * step : number * step + num_bytes], non_blocking=True)

    return time_calls([copy_all], repeats=10, warmup=2) / rotations
