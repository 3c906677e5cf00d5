"""Any policy on a trace, without the model: what it would hold of full attention, fetch, and cost.

A replay is a run in `shadow` execution: full attention drives, the policy observes. Its figures are those of such a run
over the same text, up to rounding.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

from kvframe.composition import Policy
from kvframe.dense_layer import DenseLayer
from kvframe.errors import ConfigError
from kvframe.eval.oracle import Oracle, make_oracle
from kvframe.eval.replay_layer import Built, ReplayLayer
from kvframe.eval.trace import LayerTrace, Trace, load_trace
from kvframe.memory.ledger import RESIDENT, SINKS, WINDOW
from kvframe.memory.token_ids import TokenIds
from kvframe.planner import Device, plan
from kvframe.planner.speed import UNIT_ROW_EFFICIENCY
from kvframe.types import Board

DEVICE = Device(gpu_memory=2**50)
"""What step times are predicted for, where nobody names a device: as fast as `Device` is by default, and large enough
for any model."""


@frozen(kw_only=True)
class LayerFigures:
    """One layer under one policy; lists have an entry for every KV head."""

    layer_idx: int
    captured_mass: list[float]
    """Share of full attention's softmax that the attended tokens hold, mean over steps."""
    oracle_mass: list[float]
    """What the heaviest tokens, as many as are attended to, hold."""
    oracle_recall: list[float]
    """Share of these that are attended to."""
    output_error: list[float]
    """Norm of what the policy's attention gives less what full attention gives, over the norm of the latter; summed
    over the steps in each."""
    retrieval_rate: list[float]
    """Share of steps that selected anew."""
    rows_selected: int
    rows_recalled: int
    attended_total: float
    """Tokens attended to, mean over steps and heads."""


@frozen(kw_only=True)
class Replayed:
    """A policy on a trace; means run over layers, heads and steps, and are None where every layer is dense."""

    policy: dict[str, Any]
    captured_mass: float | None
    oracle_mass: float | None
    oracle_recall: float | None
    output_error: float | None
    retrieval_rate: float | None
    hit_rate: float | None
    """Share of selected rows that were resident; None without a selection."""
    attended_total: float | None
    bytes_per_token: float
    """From host to device a step in all retrieval layers of the model, from the mean of those in the trace."""
    step_seconds: float
    """Predicted time of a decode step on a device, with this retrieval rate and these bytes."""
    layers: tuple[LayerFigures, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return attrs.asdict(self)


class Replay:
    """A trace that policies are evaluated on; what does not depend on the policy is computed once."""

    def __init__(self, trace: Trace, *, device: Device = DEVICE) -> None:
        """device: what step times are predicted for."""
        self.trace = trace
        self._device = device
        self._oracles: dict[int, Oracle] = {}
        self._built: Built = {}

    @torch.no_grad()
    def run(self, policy: Policy) -> Replayed:
        """Figures of one policy.

        Raises ConfigError for a policy that does not fit the trace's model, or that needs a layer which the trace
        lacks.
        """
        trace = self.trace
        self._check(policy)
        token_ids = TokenIds(1, torch.device("cpu")) if policy.units.needs_token_ids else None
        layers = self._layers(policy, token_ids)
        watched = [layer for layer in layers.values() if isinstance(layer, ReplayLayer)]
        errors = {layer.layout.layer_idx: _Error.none(layer.layout.num_kv_heads) for layer in watched}
        for start, stop, is_prompt in trace.calls() if watched else ():
            if token_ids is not None:
                token_ids.enter(trace.token_ids[None, start:stop], [start], [stop - start])
            for recorded in trace.layers:
                layer = layers.get(recorded.layer_idx)
                if layer is None:
                    continue
                query, keys, values = recorded.span(start, stop)
                if not is_prompt:
                    out = layer.decode(query, keys, values)
                    if isinstance(layer, ReplayLayer):
                        errors[recorded.layer_idx].add(out[0, :, 0], layer.memory.expected)
                elif isinstance(layer, ReplayLayer):
                    layer.read_prompt(query, keys, values)
                else:
                    layer.prompt(query, keys, values, [stop - start], stop - start)
        return self._figures(policy, watched, errors)

    def _check(self, policy: Policy) -> None:
        num_layers = self.trace.shape.num_layers
        dense = () if policy.dense_layers == "all" else policy.dense_layers
        if outside := [layer for layer in dense if layer >= num_layers]:
            raise ConfigError(
                f"dense_layers names layer {outside[0]}, the trace is of {self.trace.model} with layers 0 to "
                f"{num_layers - 1}; it is a trace of another model, or a policy for one"
            )
        recorded = [layer.layer_idx for layer in self.trace.layers]
        if missing := [layer for layer in policy.scorer.sources if layer not in recorded]:
            raise ConfigError(
                f"{policy.scorer!r} reads what layer {missing[0]} publishes, and the trace holds the layers "
                f"{', '.join(map(str, recorded))}; record that layer as well"
            )

    def _layers(self, policy: Policy, token_ids: TokenIds | None) -> dict[int, ReplayLayer | DenseLayer]:
        """What the recorded layers are under a policy; dense ones only where others need what they publish."""
        board: Board = {}
        capacity = self.trace.num_tokens
        found: dict[int, ReplayLayer | DenseLayer] = {}
        for recorded in self.trace.layers:
            layer_idx, layout = recorded.layer_idx, self.trace.layout(recorded)
            if not policy.is_dense(layer_idx):
                oracle = self._oracle(recorded)
                found[layer_idx] = ReplayLayer(
                    layout, policy, capacity, oracle, built=self._built, board=board, token_ids=token_ids
                )
            elif layer_idx in policy.scorer.sources:
                found[layer_idx] = DenseLayer(layout, capacity, functools.partial(policy.scorer.publish, board=board))
        return found

    def _oracle(self, recorded: LayerTrace) -> Oracle:
        if recorded.layer_idx not in self._oracles:
            self._oracles[recorded.layer_idx] = make_oracle(self.trace, recorded)
        return self._oracles[recorded.layer_idx]

    # ---- figures ----------------------------------------------------------------------------------------------------

    def _figures(self, policy: Policy, watched: Sequence[ReplayLayer], errors: "dict[int, _Error]") -> Replayed:
        layers = tuple(_layer_figures(layer, errors[layer.layout.layer_idx]) for layer in watched)
        selected = sum(layer.rows_selected for layer in layers)
        recalled = sum(layer.rows_recalled for layer in layers)
        rate = _mean(layer.retrieval_rate for layer in layers)
        num_bytes = self._bytes_per_token(policy, watched, layers)
        return Replayed(
            policy=policy.to_dict(),
            captured_mass=_mean(layer.captured_mass for layer in layers),
            oracle_mass=_mean(layer.oracle_mass for layer in layers),
            oracle_recall=_mean(layer.oracle_recall for layer in layers),
            output_error=_mean(layer.output_error for layer in layers),
            retrieval_rate=rate,
            hit_rate=1 - recalled / selected if selected else None,
            attended_total=fmean(layer.attended_total for layer in layers) if layers else None,
            bytes_per_token=num_bytes,
            step_seconds=self._step_seconds(policy, rate or 0.0, num_bytes),
            layers=layers,
        )

    def _bytes_per_token(self, policy: Policy, watched: Sequence[ReplayLayer], layers: Sequence[LayerFigures]) -> float:
        """From host to device a step, as the transfer stage would count it."""
        if not watched or not policy.transfer.host_bytes(watched[0].layout, self.trace.num_tokens):
            return 0.0
        retrieving = sum(not policy.is_dense(layer_idx) for layer_idx in self.trace.shape.retrieval_layers)
        moved = [
            figures.rows_recalled * policy.transfer.row_bytes(layer.layout)
            for layer, figures in zip(watched, layers, strict=True)
        ]
        return fmean(moved) * retrieving / self.trace.num_steps

    def _step_seconds(self, policy: Policy, retrieval_rate: float, num_bytes: float) -> float:
        """The planner's time of a step, with bytes that were counted in place of those it expects."""
        planned = plan(
            self.trace.shape,
            policy,
            self._device,
            context=self.trace.num_tokens - self.trace.num_steps,
            max_new_tokens=max(1, self.trace.num_steps),
            retrieval_rate=retrieval_rate,
        )
        scoring = retrieval_rate * planned.memory.index / self._device.memory_bandwidth
        recalling = num_bytes / (UNIT_ROW_EFFICIENCY * self._device.link_bandwidth)
        return attrs.evolve(planned.speed, step_retrieval=scoring + recalling).step


def replay(
    trace: Trace | Path,
    policies: Sequence[Policy],
    *,
    device: Device = DEVICE,
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Replayed]:
    """Figures of several policies in their order, each as soon as it is there; see `Replay.run`.

    trace: what `record` made, or a file of it.
    device: what step times are predicted for.
    jobs: processes to share the policies among; more than one needs a file.
    progress: called with the policies done and their number.

    Raises ConfigError for a file that is no trace, and what `Replay.run` raises.
    """
    if jobs > 1 and not isinstance(trace, Path):
        raise ConfigError("several jobs read the trace from a file each; save it, and pass its path")
    loaded = load_trace(trace) if isinstance(trace, Path) else trace
    with _runner(loaded, trace, device, jobs) as run:
        for done, found in enumerate(run(policies), start=1):
            yield found
            if progress is not None:
                progress(done, len(policies))


@contextmanager
def _runner(
    loaded: Trace, path: Trace | Path, device: Device, jobs: int
) -> Iterator[Callable[[Iterable[Policy]], Iterator[Replayed]]]:
    """What replays policies one after the other, here or in other processes."""
    if jobs == 1:
        runner = Replay(loaded, device=device)
        yield lambda policies: map(runner.run, policies)
        return
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), functools.partial(_start, path, device))
    try:
        yield lambda policies: pool.map(_run_elsewhere, policies)
    finally:
        pool.shutdown(cancel_futures=True)


# Of a process that replays for another one.
_elsewhere: list[Replay] = []


def _start(path: Trace | Path, device: Device) -> None:
    torch.set_num_threads(1)
    assert isinstance(path, Path)
    _elsewhere.append(Replay(load_trace(path), device=device))


def _run_elsewhere(policy: Policy) -> Replayed:
    return _elsewhere[0].run(policy)


@frozen(eq=False)
class _Error:
    """Sums over steps, for every KV head: the squared norm of the difference of two outputs, and of the second."""

    difference: Tensor
    expected: Tensor

    @classmethod
    def none(cls, num_kv_heads: int) -> "_Error":
        return cls(torch.zeros(num_kv_heads, dtype=torch.float64), torch.zeros(num_kv_heads, dtype=torch.float64))

    def add(self, out: Tensor, expected: Tensor) -> None:
        """Outputs [Hq, Dv] of one step."""
        for total, part in ((self.difference, out.double() - expected.double()), (self.expected, expected.double())):
            total += part.square().sum(-1).view(len(total), -1).sum(-1)

    def relative(self) -> list[float]:
        return [math.sqrt(float(a) / float(b)) if b else 0.0 for a, b in zip(self.difference, self.expected)]


def _layer_figures(layer: ReplayLayer, error: _Error) -> LayerFigures:
    stats, memory, steps = layer.stats, layer.memory, max(1, layer.stats.num_steps)
    attended = sum(int(stats.count_sums[kind].sum()) for kind in (SINKS, RESIDENT, WINDOW))
    return LayerFigures(
        layer_idx=layer.layout.layer_idx,
        captured_mass=_by_head(memory.captured_mass, steps),
        oracle_mass=_by_head(memory.oracle_mass, steps),
        oracle_recall=_by_head(memory.oracle_recall, steps),
        output_error=error.relative(),
        retrieval_rate=_by_head(stats.selections, steps),
        rows_selected=int(stats.rows_selected.sum()),
        rows_recalled=int(stats.rows_recalled.sum()),
        attended_total=attended / (steps * layer.layout.num_kv_heads),
    )


def _by_head(sums: Tensor, steps: int) -> list[float]:
    return [float(value) / steps for value in sums[0]]


def _mean(lists: Iterable[list[float]]) -> float | None:
    """Over layers and heads; every layer has as many heads."""
    values = [value for values in lists for value in values]
    return fmean(values) if values else None
