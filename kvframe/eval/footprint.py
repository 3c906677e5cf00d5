"""How much KV a run holds, and where: the family of KV footprints.

An entry is one token of one KV head in one layer. With N tokens in all, full attention holds L H N (N + 1) / 2 entries
over all steps, and every footprint is a share of that (Cache Me If You Can: How Many KVs Do You Need for Effective
Long-Context LMs?, 2025, arXiv 2506.17121). A policy that retrieves loses nothing, so the published figure is 1 for it;
what is on the device, and what is attended to, are told apart from it here.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

from attrs import frozen

from kvframe.errors import ConfigError
from kvframe.eval.forced import ForcedRun
from kvframe.report import Report


@frozen(kw_only=True)
class Footprint:
    """Shares of what full attention holds, summed over the tokens of a part of a run."""

    stored: float
    """Entries kept anywhere, on the device or on the host."""
    on_device: float
    """Memory that the device holds for KV and for finding units, in entries."""
    attended: float
    """Entries that attention reads."""
    peak_on_device: float
    """The most of `on_device` at one time, as a share of what full attention holds at the end."""


@frozen(kw_only=True)
class _Layer:
    """What one layer holds, in entries of one KV head."""

    num_heads: int
    fixed: float
    """Held from the first token on: slots, index, counters."""
    grows: bool
    """Whether every token's entry is held on the device as well."""
    attended: float
    """Of a decode step, on average."""
    keeps_all: bool
    in_flight: float
    """Share of the time that the prompt's entries of this layer are on the device while it is read."""


def footprint(run: ForcedRun, num_prompt: int, num_steps: int, *, decode_only: bool) -> Footprint:
    """Footprint of a run that read `num_prompt` tokens and then decoded `num_steps`.

    While a prompt is read it is attended to in full, and one layer's KV at a time is on the device on its way to where
    it stays; under a transfer that drops, every layer's is, until the first step has selected. What was allocated on
    the device counts as held, full or not; a buffer with room for every token counts by the tokens in it. With several
    turns, their prompts are counted as if they had come first.
    """
    num_tokens = num_prompt + num_steps
    first = num_prompt + 1 if decode_only else 1
    layers = _layers(run, run.report(), num_prompt, num_tokens)
    whole = sum(layer.num_heads for layer in layers)
    full = whole * _triangle(first, num_tokens)
    stored = held = attended = peak = 0.0
    for layer in layers:
        reading, decoding = _triangle(first, num_prompt), _triangle(num_prompt + 1, num_tokens)
        in_prompt = 0 if decode_only else num_prompt
        kept = reading + (decoding if layer.keeps_all else layer.attended * num_steps)
        stored += layer.num_heads * kept
        growing = (reading + decoding) if layer.grows else layer.in_flight * reading
        held += layer.num_heads * (layer.fixed * (in_prompt + num_steps) + growing)
        attended += layer.num_heads * (reading + layer.attended * num_steps)
        peak += layer.num_heads * (layer.fixed + (num_tokens if layer.grows else 0))
    if not decode_only:
        # The largest layer's prompt is on its way when everything else is there.
        leaving = [layer.num_heads * num_prompt for layer in layers if not layer.grows]
        peak += sum(leaving) if run.cache.policy.transfer.drops else max(leaving, default=0)
    return Footprint(
        stored=stored / full,
        on_device=held / full,
        attended=attended / full,
        peak_on_device=peak / (whole * num_tokens),
    )


def _triangle(first: int, last: int) -> float:
    """first + ... + last."""
    return (first + last) * max(0, last - first + 1) / 2


def _layers(run: ForcedRun, report: Report, num_prompt: int, num_tokens: int) -> list[_Layer]:
    policy = run.cache.policy
    attended = {
        layer.layer_idx: layer.attended_sinks + layer.attended_retrieved + layer.attended_window
        for layer in report.layers
    }
    drops = policy.transfer.drops
    runtimes = [layer.runtime for layer in run.cache.managed_layers if layer.runtime is not None]
    found = []
    for runtime in runtimes:
        layout = runtime.layout
        entry = layout.num_kv_heads * layout.row_bytes
        rows = runtime.device_bytes() / entry
        grows = rows >= num_tokens
        is_dense = layout.layer_idx not in attended
        found.append(
            _Layer(
                num_heads=layout.num_kv_heads,
                fixed=(rows - num_tokens if grows else rows) + runtime.index_bytes() / entry,
                grows=grows,
                attended=(num_prompt + 1 + num_tokens) / 2 if is_dense else attended[layout.layer_idx],
                keeps_all=is_dense or not drops,
                in_flight=1.0 if drops else 1 / len(runtimes),
            )
        )
    return found


@frozen(kw_only=True)
class CriticalFootprint:
    """The smallest footprint at which a share of full attention's score is kept."""

    value: float
    bound: Literal["", "<", ">"]
    """"<": already the smallest footprint that was tried keeps it; ">": not even the largest does."""

    def __str__(self) -> str:
        return f"{self.bound}{self.value:.1%}"


def critical_footprint(
    points: Iterable[tuple[float, float]], full_score: float, share: float = 0.9
) -> CriticalFootprint:
    """Where the curve of scores over footprints first reaches `share` of `full_score`, linear between its points.

    points: (footprint, score) at several budgets. Raises ConfigError for none at all.
    """
    curve = sorted(points)
    if not curve:
        raise ConfigError("a critical footprint needs at least one point (footprint, score), got none")
    wanted = share * full_score
    if curve[0][1] >= wanted:
        return CriticalFootprint(value=curve[0][0], bound="<")
    for (low, score), (high, next_score) in pairwise(curve):
        if next_score >= wanted:
            return CriticalFootprint(value=low + (high - low) * (wanted - score) / (next_score - score), bound="")
    return CriticalFootprint(value=curve[-1][0], bound=">")
