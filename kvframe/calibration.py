"""Thresholds of LouisKV's trigger from unlabelled text, for a wanted retrieval rate."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from attrs import NOTHING, asdict, field, fields, frozen
from torch import Tensor

from kvframe.errors import ConfigError
from kvframe.stages import Trigger
from kvframe.suggest import hint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_RATE = 0.07
DEFAULT_CHUNK = 1024

Progress = Callable[[int, int], None]
"""Called with the work done and the whole of it."""


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@frozen(kw_only=True)
class Calibration:
    """Thresholds, and how often they fire on the text that they come from."""

    tau: float | tuple[float, ...] = field(converter=_to_tuple)
    """What `SemanticTrigger(tau=...)` and `kvframe.policy("louiskv", tau=...)` take: one threshold, or one for every
    layer of the model. A layer that keeps no full KV cache, and so never asks, has -1.0 there."""
    rope: Literal["after", "before"]
    """The queries that were compared: after the rotary embedding, or before it. The trigger needs the same."""
    retrieval_rate: float
    """Share of steps wanted."""
    achieved: tuple[float | None, ...] = field(converter=_to_tuple)
    """Share of steps below the threshold on the same text, one for every layer of the model; None where a layer keeps
    no full KV cache."""
    num_samples: int
    """Steps that were compared in every layer."""
    anchor: float | tuple[float, ...] | None = field(default=None, converter=_to_tuple)
    """Like `tau`, for a trigger that also compares with the query of its last selection; None for one that does not."""

    @property
    def options(self) -> dict[str, Any]:
        """What it sets of a policy or a trigger; one that does not have both options cannot use it."""
        anchor = {} if self.anchor is None else {"anchor": self.anchor}
        return {"tau": self.tau, "rope": self.rope, **anchor}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The calibration that `to_dict` described. Raises ConfigError for anything else."""
        names = [attribute.name for attribute in fields(cls)]
        needed = [attribute.name for attribute in fields(cls) if attribute.default is NOTHING]
        for name in needed:
            if name not in data:
                raise ConfigError(f"a calibration needs {', '.join(needed)}; {name} is missing")
        for key in data:
            if key not in names:
                raise ConfigError(f"a calibration has no field {key!r}{hint(key, names, 'fields')}")
        return cls(**data)

    def save(self, path: Path) -> None:
        """Write it to a JSON file. Raises ConfigError where that cannot be written."""
        try:
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write the calibration to {path}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """The calibration in a JSON file, as `kvframe calibrate --output` writes it. Raises ConfigError."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the calibration {path}: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} holds a {type(data).__name__}, expected what kvframe calibrate --output writes")
        return cls.from_dict(data)


def calibrate(
    model: "PreTrainedModel",
    input_ids_list: Iterable[Tensor | Sequence[int]],
    *,
    retrieval_rate: float = DEFAULT_RATE,
    per: Literal["layer", "model"] = "layer",
    rope: Literal["after", "before"] = "after",
    trigger: Trigger | None = None,
    dense_layers: Collection[int] = (),
    chunk_size: int = DEFAULT_CHUNK,
    progress: Progress | None = None,
) -> Calibration:
    """Find tau for LouisKV's semantic trigger (arXiv 2510.11292), such that it fires on a wanted share of steps.

    The model reads each text once, with full attention. In every layer and at every token,
    r_t = mean over query heads of cos(q_{t-1}, q_t) is what the trigger would see, and it fires where r_t < tau: so tau
    is the quantile of r at the wanted rate. No generation, no labels and no search. Layers differ widely, which is why
    one tau for each of them is the default. A few thousand tokens are enough: over n of them the rate is met on other
    text of the same kind to about sqrt(rate (1 - rate) / n), besides what the texts themselves differ by.

    input_ids_list: texts, each a tensor [T] or [1, T] or a list of token ids.
    retrieval_rate: share of steps, between 0 and 1; both without the ends.
    per: one tau for every layer, or one for the whole model, over all of whose layers the rate is then met on average.
    rope: compare queries after the rotary embedding, or before it.
    trigger: one with options that have a say in when it fires, such as a maximum age, or heads that decide on their
    own. It is then run over the texts as it would run while decoding, until tau, and `anchor` where it has one, make
    all of it fire at the wanted rate; `rope` is the trigger's. That keeps all queries of the texts in host memory.
    dense_layers: layers that the policy keeps dense; they do not count in one tau for the whole model.
    chunk_size: longer texts are cut into pieces of this many tokens, which bounds memory.
    progress: called as the work goes on.

    Raises ConfigError for values that cannot be served, UnsupportedModelError for a model that cannot be attached.
    """
    from kvframe.hf.support import check_model

    _check(retrieval_rate, per, rope, chunk_size)
    check_model(model)
    if trigger is not None:
        from kvframe.calibrated_trigger import calibrate_trigger

        chunks = _chunks(input_ids_list, chunk_size)
        return calibrate_trigger(model, chunks, trigger, retrieval_rate, per, dense_layers, progress)
    samples = _observe(model, _chunks(input_ids_list, chunk_size), rope, progress)
    counted = [r for layer, r in samples.items() if layer not in dense_layers]
    if per == "model":
        check_some_layer_retrieves(samples, dense_layers)
    shared = threshold(torch.cat(counted), retrieval_rate) if per == "model" else None
    layers = range(_num_layers(model))
    taus = {layer: threshold(r, retrieval_rate) if shared is None else shared for layer, r in samples.items()}
    return Calibration(
        tau=shared if shared is not None else tuple(taus.get(layer, -1.0) for layer in layers),
        rope=rope,
        retrieval_rate=retrieval_rate,
        achieved=tuple(_rate(samples[layer], taus[layer]) if layer in samples else None for layer in layers),
        num_samples=len(next(iter(samples.values()))),
    )


def _check(retrieval_rate: float, per: str, rope: str, chunk_size: int) -> None:
    if not 0 < retrieval_rate < 1:
        raise ConfigError(
            f"retrieval_rate must lie between 0 and 1, got {retrieval_rate}; tau=-1 retrieves at the first step alone "
            "and tau=2 at every step, without calibration"
        )
    for name, value, choices in (("per", per, ("layer", "model")), ("rope", rope, ("after", "before"))):
        if value not in choices:
            raise ConfigError(f"{name} must be one of {choices[0]!r}, {choices[1]!r}; got {value!r}")
    if chunk_size < 2:
        raise ConfigError(f"chunk_size must be at least 2, got {chunk_size}")


def _chunks(texts: Iterable[Tensor | Sequence[int]], chunk_size: int) -> list[Tensor]:
    """Pieces [1, T] of all texts, T between 2 and `chunk_size`."""
    chunks: list[Tensor] = []
    for text in texts:
        ids = torch.as_tensor(text)
        if ids.numel() == 0:
            continue
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1 or ids.is_floating_point():
            raise ConfigError(
                f"expected texts as token ids of shape [T] or [1, T], got {ids.dtype} {list(ids.shape)}; pass one "
                "text after the other, without padding"
            )
        chunks += [piece[None].long() for piece in torch.split(ids, chunk_size) if len(piece) > 1]
    if not chunks:
        raise ConfigError("there is nothing to calibrate on: expected at least one text of two tokens or more")
    return chunks


def _num_layers(model: "PreTrainedModel") -> int:
    from kvframe.hf.support import decoder_config, stock_layers

    return len(stock_layers(decoder_config(model)))


def _observe(model: "PreTrainedModel", chunks: list[Tensor], rope: str, progress: Progress | None) -> dict[int, Tensor]:
    """r [n] of every layer with a full KV cache, over all adjacent tokens of all chunks."""
    from kvframe.hf.rope import relative_rotation
    from kvframe.hf.support import decoder_config, decoder_of, is_retrieval_layer, stock_layers

    rotate = relative_rotation(decoder_of(model)) if rope == "before" else None
    if rope == "before" and rotate is None:
        raise ConfigError(
            "rope='before' needs a model whose rotary embedding kvframe can undo, and this one's it cannot; use "
            "rope='after'"
        )
    layers = [i for i, layer in enumerate(stock_layers(decoder_config(model))) if is_retrieval_layer(layer)]
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def take(layer_idx: int, query: Tensor) -> None:
        found[layer_idx].append(_similarities(query, rotate).cpu())

    read_queries(model, chunks, layers, take, progress)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def read_queries(
    model: "PreTrainedModel",
    chunks: Sequence[Tensor],
    layers: Collection[int],
    take: Callable[[int, Tensor], None],
    progress: Progress | None,
) -> None:
    """Have the model read every text [1, T] once, with full attention; `take` gets the queries [1, Hq, T, D] of each of
    these layers, by its number, as they come."""
    from kvframe.hf.queries import observe_queries
    from kvframe.hf.support import decoder_of

    decoder = decoder_of(model)
    done, total = 0, len(layers) * sum(chunk.shape[1] for chunk in chunks)

    def observe(layer_idx: int, query: Tensor) -> None:
        nonlocal done
        if layer_idx in layers:
            take(layer_idx, query)
            done += query.shape[2]
            if progress is not None:
                progress(done, total)

    with torch.no_grad(), observe_queries(model, observe):
        for chunk in chunks:
            decoder(input_ids=chunk.to(model.device), use_cache=False)


def check_some_layer_retrieves(layers: Collection[int], dense_layers: Collection[int]) -> None:
    """Raise ConfigError where one tau for the model would count no layer: of `layers`, which have a full KV cache, the
    policy keeps each dense."""
    if set(layers) <= set(dense_layers):
        raise ConfigError(
            f"dense_layers names every layer with a full KV cache ({', '.join(map(str, layers))}); leave out those "
            "that the policy does not keep dense"
        )


def _similarities(query: Tensor, rotate: Callable[[Tensor, int], Tensor] | None) -> Tensor:
    """r [T - 1] of one text's queries [1, Hq, T, D]."""
    from kvframe_kernels.query_similarity import query_similarity

    steps = query[0].transpose(0, 1)  # tokens take the place of the batch
    previous = steps[:-1] if rotate is None else rotate(steps[:-1], 1)
    return query_similarity(steps[1:], previous, 1, False)[:, 0]


def threshold(r: Tensor, rate: float) -> float:
    """tau with `rate` of r strictly below it: half-way between two neighbours, where rounding flips none."""
    ordered = r.double().sort().values
    below = round(rate * len(ordered))
    low = float(ordered[below - 1]) if below > 0 else -1.0
    high = float(ordered[below]) if below < len(ordered) else 2.0
    return (low + high) / 2


def _rate(r: Tensor, tau: float) -> float:
    return float((r.double() < tau).double().mean())
