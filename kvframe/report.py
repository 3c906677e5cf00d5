"""What happened in a run: one dict, and the same as text."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from attrs import define, field, frozen

from kvframe.composition import Policy
from kvframe.layer import LayerRuntime
from kvframe.memory.dense import ShadowMemory
from kvframe.memory.ledger import RESIDENT, SINKS, WINDOW
from kvframe.runtime import RetrievalLayer


@define
class Timeline:
    """When the host started forward passes. Generation waits for every token, so host times are enough."""

    prefill_seconds: float = 0.0
    """From a call's start to its first decode step."""
    decode_seconds: float = 0.0
    num_decode_steps: int = 0
    _call_start: float | None = field(default=None, init=False)
    _decode_start: float | None = field(default=None, init=False)

    def call_begins(self) -> None:
        """`generate` was called."""
        self._call_start, self._decode_start = perf_counter(), None

    def forward_begins(self, *, is_decode: bool) -> None:
        """A forward pass starts; what came before it is done."""
        if not is_decode:
            return
        if self._decode_start is None:
            self._decode_start = perf_counter()
            if self._call_start is not None:
                self.prefill_seconds += self._decode_start - self._call_start
        self.num_decode_steps += 1

    def call_ends(self) -> None:
        """`generate` is over."""
        now = perf_counter()
        if self._decode_start is not None:
            self.decode_seconds += now - self._decode_start
        elif self._call_start is not None:
            self.prefill_seconds += now - self._call_start
        self._call_start = self._decode_start = None


@frozen(kw_only=True)
class LayerReport:
    """One retrieval layer. Rates and means run over decode steps, sequences and KV heads."""

    layer_idx: int
    num_steps: int
    retrieval_rate: float
    """Share of (step, sequence, KV head) that selected anew."""
    selections: int
    """How many of them."""
    rows_selected: int
    """Rows (one token of one KV head) that selections asked for."""
    rows_recalled: int
    """Of these, rows that were not resident and had to come."""
    hit_rate: float | None
    """Share of selected rows that were resident; None without a selection."""
    attended_sinks: float
    attended_retrieved: float
    attended_window: float
    bytes_to_host: int
    bytes_to_device: int
    captured_mass: float | None
    """Shadow execution: share of the full softmax that the attended tokens hold."""
    oracle_recall: float | None
    """Shadow execution: share of the top tokens, as many as are attended, that are attended."""


@frozen(kw_only=True)
class Report:
    """What happened since a cache was made or reset."""

    policy: dict[str, Any]
    execution: str
    num_decode_steps: int
    retrieval_rate: float
    hit_rate: float | None
    rows_selected: int
    rows_recalled: int
    bytes_to_host: int
    bytes_to_device: int
    bytes_to_device_per_step: float
    attended_sinks: float
    attended_retrieved: float
    attended_window: float
    attended_total: float
    prompt_unit_sizes: dict[int, int]
    """Prompt units by size, over layers, sequences and KV heads."""
    segment_lengths: dict[int, int]
    """Units of later tokens by size."""
    device_kv_bytes: int
    """Slots and dense layers' buffers."""
    peak_device_kv_bytes: int
    """The same, with the KV of the largest prompt layer in flight."""
    host_kv_bytes: int
    index_bytes: int
    """Device memory for finding units."""
    seconds_to_first_token: float | None
    """Summed over calls of `generate`; None without one."""
    tokens_per_second: float | None
    """Decode steps of all sequences a second; a step with proposed tokens counts once. None without `generate`."""
    captured: bool
    """Whether decode steps were replayed as CUDA graphs."""
    num_replayed: int
    """Decode steps that were."""
    capture_reason: str | None
    """Why the last one was not; None where it was, or where nobody tried."""
    captured_mass: float | None
    oracle_recall: float | None
    layers: tuple[LayerReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        import attrs

        return attrs.asdict(self)

    def __str__(self) -> str:
        return "\n".join(f"{label:<24}{text}" for label, text in self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        rates = [layer.retrieval_rate for layer in self.layers]
        spread = f" (layers {min(rates):.1%} to {max(rates):.1%})" if rates else ""
        lines = [
            ("policy", f"{self.policy['name']}, {self.execution} execution"),
            ("decode steps", f"{self.num_decode_steps}"),
            ("retrieval rate", f"{self.retrieval_rate:.1%}{spread}"),
            (
                "attended tokens",
                f"{self.attended_total:.0f} = {self.attended_sinks:.0f} sinks + "
                f"{self.attended_retrieved:.0f} retrieved + {self.attended_window:.0f} window",
            ),
            ("rows selected", f"{self.rows_selected:,}, of which {self.rows_recalled:,} had to be recalled"),
            ("resident hit rate", _or_dash(self.hit_rate, ".1%")),
            ("to device", f"{_size(self.bytes_to_device)}, {_size(self.bytes_to_device_per_step)} a step"),
            ("to host", _size(self.bytes_to_host)),
            ("prompt units", _histogram(self.prompt_unit_sizes)),
            ("output segments", _histogram(self.segment_lengths)),
            ("KV on the device", f"{_size(self.device_kv_bytes)}, peak {_size(self.peak_device_kv_bytes)}"),
            ("KV on the host", _size(self.host_kv_bytes)),
            ("index", _size(self.index_bytes)),
            ("time to first token", _or_dash(self.seconds_to_first_token, ".2f", " s")),
            ("tokens a second", _or_dash(self.tokens_per_second, ".2f")),
        ]
        if self.captured_mass is not None and self.oracle_recall is not None:
            lines.append(("captured mass", f"{self.captured_mass:.1%}, recall of the oracle {self.oracle_recall:.1%}"))
        return lines


def make_report(
    policy: Policy,
    execution: str,
    runtimes: Sequence[LayerRuntime],
    timeline: Timeline,
    in_flight_bytes: int,
    *,
    num_replayed: int = 0,
    capture_reason: str | None = None,
) -> Report:
    """Read the counters of all layers."""
    retrieval = [runtime for runtime in runtimes if isinstance(runtime, RetrievalLayer)]
    layers = tuple(_layer_report(runtime) for runtime in retrieval)
    device = sum(runtime.device_bytes() for runtime in runtimes)
    steps = timeline.num_decode_steps
    batch_size = runtimes[0].layout.batch_size if runtimes else 0
    selected, recalled = sum(r.rows_selected for r in layers), sum(r.rows_recalled for r in layers)
    to_device = sum(r.bytes_to_device for r in layers)
    attended = [_mean([getattr(r, f"attended_{kind}") for r in layers]) for kind in ("sinks", "retrieved", "window")]
    watched = execution == "shadow" and layers
    return Report(
        policy=policy.to_dict(),
        execution=execution,
        num_decode_steps=steps,
        retrieval_rate=_mean([r.retrieval_rate for r in layers]),
        hit_rate=1 - recalled / selected if selected else None,
        rows_selected=selected,
        rows_recalled=recalled,
        bytes_to_host=sum(r.bytes_to_host for r in layers),
        bytes_to_device=to_device,
        bytes_to_device_per_step=to_device / steps if steps else 0.0,
        attended_sinks=attended[0],
        attended_retrieved=attended[1],
        attended_window=attended[2],
        attended_total=sum(attended),
        prompt_unit_sizes=_count_sizes(retrieval, prompt=True),
        segment_lengths=_count_sizes(retrieval, prompt=False),
        device_kv_bytes=device,
        peak_device_kv_bytes=device + in_flight_bytes,
        host_kv_bytes=sum(runtime.host_bytes() for runtime in runtimes),
        index_bytes=sum(runtime.index_bytes() for runtime in runtimes),
        seconds_to_first_token=timeline.prefill_seconds or None,
        tokens_per_second=steps * batch_size / timeline.decode_seconds if timeline.decode_seconds else None,
        captured=num_replayed > 0,
        num_replayed=num_replayed,
        capture_reason=capture_reason,
        captured_mass=_mean([r.captured_mass or 0.0 for r in layers]) if watched else None,
        oracle_recall=_mean([r.oracle_recall or 0.0 for r in layers]) if watched else None,
        layers=layers,
    )


def _layer_report(runtime: RetrievalLayer) -> LayerReport:
    stats, traffic = runtime.stats, runtime.memory.traffic
    chances = max(1, stats.num_steps * stats.selections.numel())
    selected, recalled = int(stats.rows_selected.sum()), int(stats.rows_recalled.sum())
    selections = int(stats.selections.sum())
    mass = recall = None
    if isinstance(runtime.memory, ShadowMemory):
        mass = float(runtime.memory.captured_mass.sum()) / chances
        recall = float(runtime.memory.oracle_recall.sum()) / chances
    return LayerReport(
        layer_idx=runtime.layout.layer_idx,
        num_steps=stats.num_steps,
        retrieval_rate=selections / chances,
        selections=selections,
        rows_selected=selected,
        rows_recalled=recalled,
        hit_rate=1 - recalled / selected if selected else None,
        attended_sinks=int(stats.count_sums[SINKS].sum()) / chances,
        attended_retrieved=int(stats.count_sums[RESIDENT].sum()) / chances,
        attended_window=int(stats.count_sums[WINDOW].sum()) / chances,
        bytes_to_host=traffic.bytes_to_host,
        bytes_to_device=traffic.bytes_to_device(recalled),
        captured_mass=mass,
        oracle_recall=recall,
    )


def _count_sizes(runtimes: Sequence[RetrievalLayer], *, prompt: bool) -> dict[int, int]:
    if not runtimes:
        return {}
    sizes, counts = torch.unique(
        torch.cat([runtime.unit_sizes(prompt=prompt) for runtime in runtimes]), return_counts=True
    )
    return {int(size): int(count) for size, count in zip(sizes, counts, strict=True)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _or_dash(value: float | None, spec: str, suffix: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{suffix}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def _histogram(counts: dict[int, int]) -> str:
    total = sum(counts.values())
    if not total:
        return "none"
    mean = sum(size * count for size, count in counts.items()) / total
    return f"{total:,}, of {min(counts)} to {max(counts)} tokens, mean {mean:.1f}"
