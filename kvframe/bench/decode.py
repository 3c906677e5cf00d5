"""`kvframe bench decode`: a decode step of several policies and caches, side by side in one process."""

import gc
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from transformers import PreTrainedModel

from kvframe.bench import Outcome
from kvframe.bench.contender import STOCK, Contender, Sizes, make_policy, parse_contenders, policy_by_name
from kvframe.bench.environment import describe
from kvframe.bench.model import (
    fill_randomly,
    forward,
    make_model,
    prefill,
    random_ids,
    stock_bytes,
    stock_cache,
    weight_bytes,
)
from kvframe.bench.timing import StepTimes, copy_bandwidth, time_steps
from kvframe.report import Report

DEFAULT_POLICIES = "louiskv,louiskv@0,louiskv@1,louiskv-plus,window,quest,dynamic-cache,offloaded-cache"

Fill = Literal["prefill", "random"]
Progress = Callable[[str], None]


@frozen(kw_only=True)
class DecodeBenchmark:
    """What to compare, and how."""

    contenders: list[Contender] = field(factory=lambda: parse_contenders(DEFAULT_POLICIES, compile=False))
    model_shape: str = "llama-3.1-8b"
    context: int = 131072
    """Prompt tokens of every sequence."""
    batch_size: int = 1
    steps: int = 512
    """Timed steps of a policy."""
    stock_steps: int = 128
    """Timed steps of DynamicCache."""
    offloaded_steps: int = 12
    """Timed steps of OffloadedCache, which takes most of a second for each at a long context."""
    warmup: int = 16
    """Steps before the clock starts: the first selection, compiling and capturing fall into them."""
    prefill_chunk: int = 16384
    """Tokens of a piece of the prompt; 0 reads it at once."""
    fill: Fill = "random"
    """How the caches of transformers get their KV; policies always read the prompt."""
    sizes: Sizes = field(factory=Sizes)
    fire_rate: float = 0.07
    miss: float = 0.3
    page_miss: float | None = None
    """`miss` of policies that select at every step; the same if None."""
    capture: bool = True

    def quick(self) -> "DecodeBenchmark":
        """The same as a smoke run."""
        return evolve(
            self,
            context=min(self.context, 4096),
            steps=min(self.steps, 24),
            stock_steps=min(self.stock_steps, 4),
            offloaded_steps=min(self.offloaded_steps, 2),
            warmup=min(self.warmup, 4),
        )


def run_decode(benchmark: DecodeBenchmark, device: torch.device, progress: Progress = lambda text: None) -> Outcome:
    """Measure all contenders, one after the other, and release each before the next.

    Raises UnknownNameError for a policy that no plugin brings, and what `kvframe.attach` raises.
    """
    for contender in benchmark.contenders:  # names are checked before a model is built
        if not contender.is_stock:
            policy_by_name(contender.name, benchmark.sizes)
    with torch.no_grad():
        progress("building the model")
        model = make_model(benchmark.model_shape, device)
        bandwidth = copy_bandwidth(device) if device.type == "cuda" else None
        weights = weight_bytes(model)
        rows: list[dict[str, Any]] = []
        sizes = benchmark.sizes
        attended, matched = sizes.sink_size + sizes.token_budget + sizes.window_size, False
        for contender in benchmark.contenders:
            progress(contender.label)
            if contender.is_stock:
                rows.append(_measure_stock(benchmark, contender, model, device))
            else:
                rows.append(_measure_policy(benchmark, contender, attended, model, device))
                if not matched and contender.name.startswith("louiskv"):
                    attended, matched = round(rows[-1]["attended_tokens"]), True
            # Said at once: a run that is broken off has not measured in vain.
            progress(f"{contender.label}: {rows[-1]['mean_ms'] or math.nan:.3f} ms a step")
            _free(device)
    floor_ms = None if bandwidth is None else 1e3 * weights / bandwidth
    return Outcome(
        benchmark="decode",
        environment=describe(device),
        conditions=_conditions(benchmark, model)
        | {"weight_bytes": weights, "copy_bytes_per_s": bandwidth, "weights_once_ms": floor_ms},
        rows=rows,
        ratios=compare(rows, floor_ms),
        notes=_notes(benchmark, attended, matched),
    )


# ---- one contender --------------------------------------------------------------------------------------------------


def _measure_stock(
    benchmark: DecodeBenchmark, contender: Contender, model: PreTrainedModel, device: torch.device
) -> dict[str, Any]:
    offloading = contender.name == "offloaded-cache"
    if offloading and device.type != "cuda":
        return _row(contender, error="OffloadedCache needs a CUDA device")
    cache = stock_cache(model, offloading=offloading)
    ids = random_ids(model, benchmark.batch_size, benchmark.context)
    _reset_peak(device)
    if benchmark.fill == "random":
        fill_randomly(model, cache, benchmark.batch_size, benchmark.context)
        token = ids[:, -1:]
    else:
        token = prefill(model, ids, cache, benchmark.prefill_chunk)
    steps = benchmark.offloaded_steps if offloading else benchmark.stock_steps
    peak_prefill, held = _reset_peak(device), stock_bytes(cache, device)
    times = _decode(model, token, cache, min(benchmark.warmup, 3), steps, device)
    return _row(
        contender,
        times=times,
        batch_size=benchmark.batch_size,
        attended_tokens=float(benchmark.context),
        device_kv_bytes=held,
        peak_prefill_bytes=peak_prefill,
        peak_decode_bytes=_reset_peak(device),
    )


def _measure_policy(
    benchmark: DecodeBenchmark, contender: Contender, attended: int, model: PreTrainedModel, device: torch.device
) -> dict[str, Any]:
    import kvframe

    policy = make_policy(
        contender,
        benchmark.sizes,
        attended,
        fire_rate=benchmark.fire_rate,
        miss=benchmark.miss,
        page_miss=benchmark.miss if benchmark.page_miss is None else benchmark.page_miss,
        steps=benchmark.steps,
    )
    ids = random_ids(model, benchmark.batch_size, benchmark.context)
    max_length = benchmark.context + benchmark.warmup + benchmark.steps + 8
    capture = None if benchmark.capture else False
    with kvframe.attach(model, policy, capture=capture, compile=contender.compile) as run:
        cache = run.new_cache(max_length)
        _reset_peak(device)
        token = prefill(model, ids, cache, benchmark.prefill_chunk)
        peak_prefill = _reset_peak(device)
        held = run.report()
        token = _warm(model, token, cache, benchmark.warmup)
        before = run.report()
        times = _decode(model, token, cache, 0, benchmark.steps, device)
        after = run.report()
    return _row(
        contender,
        times=times,
        batch_size=benchmark.batch_size,
        attended_tokens=after.attended_total,
        **_between(before, after),
        captured=after.num_replayed - before.num_replayed == benchmark.steps,
        capture_reason=after.capture_reason,
        device_kv_bytes=held.device_kv_bytes,
        index_bytes=after.index_bytes,
        host_kv_bytes=held.host_kv_bytes,
        peak_prefill_bytes=peak_prefill,
        peak_decode_bytes=_reset_peak(device),
    )


def _warm(model: PreTrainedModel, token: torch.Tensor, cache: Any, num_steps: int) -> torch.Tensor:
    for _ in range(num_steps):
        token = forward(model, token, cache)
    return token


def _decode(
    model: PreTrainedModel, token: torch.Tensor, cache: Any, warmup: int, steps: int, device: torch.device
) -> StepTimes:
    state = [_warm(model, token, cache, warmup)]

    def step() -> None:
        state[0] = forward(model, state[0], cache)

    return time_steps(step, steps, device)


def _between(before: Report, after: Report) -> dict[str, float | None]:
    """Rates of the timed steps alone."""
    steps = after.num_decode_steps - before.num_decode_steps
    fired = after.retrieval_rate * after.num_decode_steps - before.retrieval_rate * before.num_decode_steps
    selected = after.rows_selected - before.rows_selected
    recalled = after.rows_recalled - before.rows_recalled
    return {
        "retrieval_rate": fired / steps,
        "miss_rate": recalled / selected if selected else None,
        "bytes_to_device_per_step": (after.bytes_to_device - before.bytes_to_device) / steps,
    }


_COLUMNS = (
    "mean_ms", "median_ms", "tokens_per_s", "steps", "attended_tokens", "retrieval_rate", "miss_rate",
    "bytes_to_device_per_step", "captured", "capture_reason", "device_kv_bytes", "index_bytes", "host_kv_bytes",
    "peak_prefill_bytes", "peak_decode_bytes", "error",
)  # fmt: skip


def _row(contender: Contender, times: StepTimes | None = None, batch_size: int = 0, **figures: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"name": contender.label, "compile": contender.compile}
    row |= dict.fromkeys(_COLUMNS)
    if times is not None:
        row |= {"mean_ms": times.mean_ms, "median_ms": times.median_ms, "steps": times.num_steps}
        row["tokens_per_s"] = 1e3 * batch_size / times.mean_ms
    return row | figures


# ---- the whole ------------------------------------------------------------------------------------------------------


def compare(rows: list[dict[str, Any]], floor_ms: float | None) -> dict[str, float]:
    """Ratios of mean step times; those of rows that were not measured are left out."""
    means = {row["name"]: row["mean_ms"] for row in rows if row["mean_ms"] is not None}
    ratios: dict[str, float] = {}
    for name, mean in means.items():
        if floor_ms:
            ratios[f"{name} / weights once"] = mean / floor_ms
        if not name.startswith("louiskv"):
            continue
        base, plus, suffix = name.partition("+")
        faithful = name.replace("louiskv-plus", "louiskv", 1)
        if faithful != name and faithful in means:
            ratios[f"{name} / {faithful}"] = mean / means[faithful]
        for other in ("window", "quest"):
            if (peer := f"{other}{plus}{suffix}") in means:
                ratios[f"{name} / {peer}"] = mean / means[peer]
        for other in ("dynamic-cache", "offloaded-cache"):
            if other in means:
                ratios[f"{other} / {name}"] = means[other] / mean
        idle = f"{base.partition('@')[0]}@0{plus}{suffix}"
        if idle in means and idle != name:
            ratios[f"{name} / {idle}"] = mean / means[idle]
    return ratios


def _conditions(benchmark: DecodeBenchmark, model: PreTrainedModel) -> dict[str, Any]:
    sizes = benchmark.sizes
    return {
        "model_shape": benchmark.model_shape,
        "dtype": str(model.dtype).removeprefix("torch."),
        "context": benchmark.context,
        "batch_size": benchmark.batch_size,
        "steps": benchmark.steps,
        "warmup": benchmark.warmup,
        "prefill_chunk": benchmark.prefill_chunk,
        "stock_fill": benchmark.fill,
        "fire_rate": benchmark.fire_rate,
        "miss": benchmark.miss,
        "page_miss": benchmark.miss if benchmark.page_miss is None else benchmark.page_miss,
        "sink_size": sizes.sink_size,
        "token_budget": sizes.token_budget,
        "window_size": sizes.window_size,
        "dense_layers": list(sizes.dense_layers),
    }


def _notes(benchmark: DecodeBenchmark, attended: int, matched: bool) -> list[str]:
    names = {contender.name for contender in benchmark.contenders}
    notes = [f"means over {benchmark.steps} steps"]
    for name, steps in (("dynamic-cache", benchmark.stock_steps), ("offloaded-cache", benchmark.offloaded_steps)):
        if name in names:
            notes[0] += f"; {name} over {steps}"
    if "window" in names:
        source = "as many as louiskv did" if matched else "as many as sinks, budget and window are together"
        notes.append(f"window attends to {attended} tokens, {source}")
    if names - {"window", "full", *STOCK}:
        notes.append("firing and missing are forced; triggers, scorers and selectors do their work all the same")
    return notes


def _reset_peak(device: torch.device) -> int | None:
    """Most device memory allocated since the last call, in bytes; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
