"""`kvframe bench prefill`: time to the first token under a policy against plain prefill, at several contexts."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from time import perf_counter
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor
from transformers import PreTrainedModel

from kvframe.bench import Outcome
from kvframe.bench.contender import STOCK, Sizes, policy_by_name
from kvframe.bench.environment import describe
from kvframe.bench.model import make_model, prefill, random_ids, stock_cache
from kvframe.composition import Policy
from kvframe.memory.pinned import pinned_memory

DEFAULT_POLICIES = "dynamic-cache,louiskv"
PLAIN = STOCK[0]


@frozen(kw_only=True)
class PrefillBenchmark:
    """What to compare, and how."""

    policies: tuple[str, ...] = tuple(DEFAULT_POLICIES.split(","))
    """Names of policies; "dynamic-cache" is plain prefill."""
    model_shape: str = "llama-3.1-8b"
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    batch_size: int = 1
    chunks: tuple[int, ...] = (0, 16384)
    """Tokens of a piece of the prompt, 0 for all at once; a context that is no longer is left out."""
    repeats: int = 2
    """Timed runs, after a first one."""
    sizes: Sizes = field(factory=Sizes)

    def quick(self) -> "PrefillBenchmark":
        """The same as a smoke run."""
        return evolve(self, contexts=(min(*self.contexts, 2048),), chunks=(0, 1024), repeats=1)


def run_prefill(
    benchmark: PrefillBenchmark, device: torch.device, progress: Callable[[str], None] = lambda text: None
) -> Outcome:
    """Measure every policy at every context, all at once and in chunks.

    The first run of a policy allocates, pins and compiles; its time and the pinning in it stand apart. The timed runs
    use the same cache, emptied, so that its host memory is pinned already.
    """
    # Names and sizes are checked before a model is built.
    policies = {name: None if name == PLAIN else policy_by_name(name, benchmark.sizes) for name in benchmark.policies}
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        progress("building the model")
        model = make_model(benchmark.model_shape, device)
        for context in benchmark.contexts:
            for chunk in benchmark.chunks:
                if chunk >= context:
                    continue
                for name, policy in policies.items():
                    progress(f"{name}, {context:,} tokens")
                    rows.append(_measure(benchmark, model, name, policy, context, chunk, device))
                    gc.collect()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
    return Outcome(
        benchmark="prefill",
        environment=describe(device),
        conditions={
            "model_shape": benchmark.model_shape,
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch_size": benchmark.batch_size,
            "repeats": benchmark.repeats,
            "sink_size": benchmark.sizes.sink_size,
            "token_budget": benchmark.sizes.token_budget,
            "window_size": benchmark.sizes.window_size,
            "dense_layers": list(benchmark.sizes.dense_layers),
        },
        rows=rows,
        ratios=compare(rows),
        notes=["medians of the timed runs; logits of the last position only"],
    )


def _measure(
    benchmark: PrefillBenchmark,
    model: PreTrainedModel,
    name: str,
    policy: Policy | None,
    context: int,
    chunk: int,
    device: torch.device,
) -> dict[str, Any]:
    import kvframe

    ids = random_ids(model, benchmark.batch_size, context)
    memory = pinned_memory()
    pinning = memory.pinning_seconds
    attached: AbstractContextManager[Any] = nullcontext() if policy is None else kvframe.attach(model, policy)
    with attached as run:
        cache: Any = None if policy is None else run.new_cache(context + 1)
        first, _ = _once(model, ids, cache, chunk, device)
        pinning = memory.pinning_seconds - pinning
        tokens, done = [], []
        for _ in range(benchmark.repeats):
            if cache is not None:
                cache.reset()
            to_token, to_end = _once(model, ids, cache, chunk, device)
            tokens.append(to_token)
            done.append(to_end)
    return {
        "name": name,
        "context": context,
        "chunk": chunk,
        "seconds_to_first_token": median(tokens),
        "seconds_until_idle": median(done),
        "first_run_seconds": first,
        "pinning_seconds": pinning,
    }


def _once(model: PreTrainedModel, ids: Tensor, cache: Any, chunk: int, device: torch.device) -> tuple[float, float]:
    """Seconds until the host knows the first token, and until the device has nothing left to do."""
    cache = stock_cache(model) if cache is None else cache
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = perf_counter()
    prefill(model, ids, cache, chunk).tolist()
    to_token = perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return to_token, perf_counter() - start


def compare(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Each policy's time to the first token over that of plain prefill of the same context, read in the same way."""
    plain = {(row["context"], row["chunk"]): row["seconds_to_first_token"] for row in rows if row["name"] == PLAIN}
    ratios = {}
    for row in rows:
        key = (row["context"], row["chunk"])
        if row["name"] != PLAIN and key in plain:
            how = f"chunks of {row['chunk']:,}" if row["chunk"] else "at once"
            ratios[f"{row['name']} / {PLAIN}, {row['context']:,} tokens, {how}"] = (
                row["seconds_to_first_token"] / plain[key]
            )
    return ratios
