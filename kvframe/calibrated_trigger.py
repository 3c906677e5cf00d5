"""Thresholds of a trigger whose other options fire as well: found by running it over recorded queries."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from attrs import evolve, frozen
from torch import Tensor

from kvframe.calibration import Calibration, Progress, check_some_layer_retrieves, read_queries, threshold
from kvframe.errors import ConfigError
from kvframe.stages import Trigger
from kvframe.types import LayerLayout, StepInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_TRIALS = 10
_CLOSE_ENOUGH = 0.02
"""Of the wanted rate: closer than other text comes anyway."""
_FAR_OFF = 0.1
"""Of the wanted rate: what no threshold brings nearer than that is an error."""


@frozen(kw_only=True, eq=False)
class RecordedLayer:
    """What one layer's trigger sees of all texts."""

    layout: LayerLayout
    queries: list[Tensor]
    """[n, Hq, T, D] each, n texts of one length."""
    adjacent: Tensor
    """[N], similarities of a query to the one before it: `tau` is a quantile of these."""
    distant: Tensor
    """[N], to one as far back as selections are apart at the wanted rate, before RoPE: so is `anchor` of these."""

    def thresholds(self, share: float) -> dict[str, float]:
        """Those below which this share of the similarities lies."""
        found = {"tau": threshold(self.adjacent, share)}
        return found if len(self.distant) == 0 else found | {"anchor": threshold(self.distant, share)}

    def rate(self, trigger: Trigger) -> float:
        """Share of steps and heads at which it fires, the first step of a text left out, which always does."""
        fired = num_seen = 0
        for queries in self.queries:
            state = trigger.init(evolve(self.layout, batch_size=len(queries)))
            trigger.begin(queries[:, :, 0], state)
            for step in range(1, queries.shape[2]):
                decision = trigger.step(StepInputs(query=queries[:, :, step], layout=self.layout), state)
                fires = decision.due if decision.ahead is None else decision.due | decision.ahead
                if step > 1:
                    fired += int(fires.sum())
                    num_seen += fires.numel()
        return fired / max(1, num_seen)


def record_layer(
    queries: Sequence[Tensor], layout: LayerLayout, trigger: Trigger, retrieval_rate: float
) -> RecordedLayer:
    """What a trigger of this kind sees of one layer's queries, [n, Hq, T, D] each, and compares.

    Raises ConfigError where the trigger cannot run in this layer.
    """
    trigger.init(layout)
    before = getattr(trigger, "rope", "after") == "before"
    adjacent = _similarities(queries, 1, trigger, layout, before=before)
    distant = torch.empty(0)
    if getattr(trigger, "anchor", None) is not None:
        distant = _similarities(queries, max(1, round(1 / retrieval_rate)), trigger, layout, before=True)
    return RecordedLayer(layout=layout, queries=list(queries), adjacent=adjacent, distant=distant)


def find_thresholds(
    trigger: Trigger,
    layers: Mapping[int, RecordedLayer],
    retrieval_rate: float,
    per: Literal["layer", "model"],
    dense_layers: Collection[int] = (),
) -> dict[int, tuple[dict[str, float], float]]:
    """For every layer the thresholds at which all of a trigger fires at the rate, and the rate that they give.

    What is searched for is one share p: `tau` is the similarity of neighbouring queries below which a share p of them
    lies, and `anchor`, where the trigger has one, that of queries as far apart as selections shall be. So each alone
    would fire about equally often, and together they fire at the wanted rate.

    Dense layers get what comes nearest. Raises ConfigError for a rate that no threshold gives elsewhere, and for one
    tau for the model where all layers are dense.
    """
    if per == "layer":
        found = {}
        for layer_idx, layer in layers.items():
            found[layer_idx], nearest = _search(trigger, {layer_idx: layer}, layer, retrieval_rate)
            if layer_idx not in dense_layers:
                _check_rate(trigger, retrieval_rate, nearest, f"layer {layer_idx}")
    else:
        check_some_layer_retrieves(layers, dense_layers)
        counted = {layer_idx: layer for layer_idx, layer in layers.items() if layer_idx not in dense_layers}
        own, nearest = _search(trigger, counted, _together(list(counted.values())), retrieval_rate)
        _check_rate(trigger, retrieval_rate, nearest, f"{len(counted)} layers")
        found = dict.fromkeys(layers, own)
    set_to: Any = evolve
    return {idx: (own, layers[idx].rate(set_to(trigger, **own))) for idx, own in found.items()}


def calibrate_trigger(
    model: "PreTrainedModel",
    chunks: Sequence[Tensor],
    trigger: Trigger,
    retrieval_rate: float,
    per: Literal["layer", "model"],
    dense_layers: Collection[int],
    progress: Progress | None,
) -> Calibration:
    """`kvframe.calibrate` for a trigger that is given.

    Raises ConfigError for a trigger without `tau`, and what `find_thresholds` raises.
    """
    names = {field.name for field in attrs.fields(type(trigger))}  # type: ignore[arg-type]  # a stage is an attrs class
    if "tau" not in names:
        raise ConfigError(f"{trigger!r} has no tau to be calibrated; calibrate a trigger such as LouisKV's")
    layers = _record(model, chunks, trigger, retrieval_rate, progress)
    found = find_thresholds(trigger, layers, retrieval_rate, per, dense_layers)
    first, _ = next(iter(found.values()))
    num_layers = next(iter(layers.values())).layout.num_layers

    def of(name: str) -> Any:
        if per == "model":
            return first[name]
        return tuple(found[idx][0][name] if idx in found else -1.0 for idx in range(num_layers))

    return Calibration(
        tau=of("tau"),
        anchor=of("anchor") if "anchor" in first else None,
        rope=getattr(trigger, "rope", "after"),
        retrieval_rate=retrieval_rate,
        achieved=tuple(found[idx][1] if idx in found else None for idx in range(num_layers)),
        num_samples=sum(chunk.shape[1] - 1 for chunk in chunks),
    )


def _search(
    trigger: Trigger, layers: Mapping[int, RecordedLayer], shared: RecordedLayer, wanted: float
) -> tuple[dict[str, float], float]:
    """Thresholds at which a trigger fires at a rate, the mean over layers, as nearly as may be; and the rate they
    give."""

    def rate(share: float) -> float:
        set_to: Any = evolve(trigger, **shared.thresholds(share))  # type: ignore[misc]
        return sum(layer.rate(set_to) for layer in layers.values()) / len(layers)

    low, share, high = 0.0, wanted, None
    best, nearest = share, float("inf")
    for _ in range(_MOST_TRIALS):
        found = rate(share)
        if abs(found - wanted) < abs(nearest - wanted):
            best, nearest = share, found
        if abs(nearest - wanted) <= _CLOSE_ENOUGH * wanted:
            break
        low, high = (low, share) if found > wanted else (share, high)
        # Upwards in small steps: with hysteresis a trigger fires less again where hardly any query comes to rest.
        share = min(1.5 * share, (1 + share) / 2) if high is None else (low + high) / 2
    return shared.thresholds(best), nearest


def _check_rate(trigger: Trigger, wanted: float, found: float, where: str) -> None:
    """Raise ConfigError for a rate that is not the one wanted."""
    if abs(found - wanted) > max(_FAR_OFF * wanted, 0.005):
        raise ConfigError(
            f"no thresholds have {trigger!r} fire on {wanted:.1%} of the steps in {where}: it comes as near as "
            f"{found:.1%}; want another rate, or change its other options"
        )


def _together(layers: Sequence[RecordedLayer]) -> RecordedLayer:
    """For the quantiles of all of them."""
    adjacent, distant = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("adjacent", "distant"))
    return evolve(layers[0], adjacent=adjacent, distant=distant)


def _record(
    model: "PreTrainedModel",
    chunks: Sequence[Tensor],
    trigger: Trigger,
    retrieval_rate: float,
    progress: Progress | None,
) -> dict[int, RecordedLayer]:
    """What the layers with a full KV cache see of all texts, by their number."""
    from kvframe.hf.rope import relative_rotation
    from kvframe.hf.shape import model_shape
    from kvframe.hf.support import decoder_of

    shape = model_shape(model.config, model.dtype)
    rotate = relative_rotation(decoder_of(model))
    recorded: dict[int, dict[int, list[Tensor]]] = {layer_idx: {} for layer_idx in shape.retrieval_layers}

    def take(layer_idx: int, query: Tensor) -> None:
        recorded[layer_idx].setdefault(query.shape[2], []).append(query)

    read_queries(model, chunks, recorded, take, progress)
    found = {}
    for layer_idx, by_length in recorded.items():
        queries = [torch.cat(texts) for texts in by_length.values()]
        layout = evolve(shape.layout(1, layer_idx), num_qo_heads=queries[0].shape[1], device=queries[0].device)
        found[layer_idx] = record_layer(queries, evolve(layout, rotate=rotate), trigger, retrieval_rate)
    return found


def _similarities(
    queries: Sequence[Tensor], distance: int, trigger: Trigger, layout: LayerLayout, *, before: bool
) -> Tensor:
    """[N] of queries to those `distance` steps before, of heads or of the whole layer as the trigger takes them."""
    from kvframe_kernels.query_similarity import query_similarity

    per_kv_head = getattr(trigger, "heads", "kv-head") == "kv-head"
    num_kept = layout.num_kv_heads if per_kv_head else 1
    found = [torch.empty(0)]
    for texts in queries:
        for text in texts:
            steps = text.transpose(0, 1)  # tokens take the place of the batch
            older = steps[:-distance]
            if before and len(older):
                assert layout.rotate is not None
                older = layout.rotate(older, distance)
            similar = query_similarity(steps[distance:], older, layout.num_kv_heads, per_kv_head)
            found.append(similar[:, :num_kept].flatten().cpu())
    return torch.cat(found)
