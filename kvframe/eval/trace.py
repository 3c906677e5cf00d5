"""Queries, keys and values of some layers over one text, recorded once under full attention.

Whatever a policy decides follows from them, so that policies can be looked at without the model: `kvframe.eval.replay`.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import attrs
import torch
from attrs import frozen
from torch import Tensor

from kvframe.errors import ConfigError
from kvframe.eval.fingerprint import fingerprint
from kvframe.eval.forced import check_length
from kvframe.eval.tasks import Sample
from kvframe.planner import ModelShape
from kvframe.types import LayerLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
DEFAULT_LAYERS = 4
"""Layers that are recorded if nobody says which."""
MAX_BYTES = 2 * 2**30
"""A trace is not larger than this unless more is allowed."""
_KEY = "kvframe_trace"
_PARTS = ("query", "keys", "values")


@frozen(kw_only=True, eq=False)
class LayerTrace:
    """One layer."""

    layer_idx: int
    sm_scale: float
    query: Tensor
    """[Hq, N, D], after RoPE."""
    keys: Tensor
    """[H, N, D], after RoPE."""
    values: Tensor
    """[H, N, Dv]"""

    def span(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values of some tokens, with a batch of one in front."""
        query, keys, values = (part[None, :, start:stop] for part in (self.query, self.keys, self.values))
        return query, keys, values


@frozen(kw_only=True, eq=False)
class Trace:
    """Some layers of one model over one text of N tokens."""

    model: str
    """What the model is called; for people."""
    fingerprint: str
    """Of the model, as `kvframe.eval.fingerprint` makes it."""
    shape: ModelShape
    """Of the whole model."""
    turns: tuple[tuple[int, int], ...]
    """For every turn: tokens read as prompt, and decode steps after it."""
    token_ids: Tensor
    """int64 [N]"""
    layers: tuple[LayerTrace, ...]
    rotation: Tensor | None
    """[D, D]: what turns a query by one position, as q @ rotation; None where that is not known of the model."""

    @property
    def num_tokens(self) -> int:
        """N"""
        return len(self.token_ids)

    @property
    def num_steps(self) -> int:
        """Decode steps of all turns."""
        return sum(steps for _, steps in self.turns)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the layers."""
        return sum(getattr(layer, part).nbytes for layer in self.layers for part in _PARTS)

    def calls(self) -> Iterator[tuple[int, int, bool]]:
        """The calls of a layer: first token, token behind the last, and whether it is a prompt."""
        start = 0
        for num_prompt, num_steps in self.turns:
            yield start, start + num_prompt, True
            start += num_prompt
            for _ in range(num_steps):
                yield start, start + 1, False
                start += 1

    def layout(self, layer: LayerTrace) -> LayerLayout:
        """A layer's shape, on the CPU."""
        return LayerLayout(
            layer_idx=layer.layer_idx,
            num_layers=self.shape.num_layers,
            batch_size=1,
            num_qo_heads=layer.query.shape[0],
            num_kv_heads=layer.keys.shape[0],
            head_dim=layer.keys.shape[2],
            value_dim=layer.values.shape[2],
            dtype=layer.keys.dtype,
            device=layer.keys.device,
            sm_scale=layer.sm_scale,
            rotate=None if self.rotation is None else self._rotate,
        )

    def _rotate(self, query: Tensor, num_positions: int) -> Tensor:
        assert self.rotation is not None
        turned = torch.linalg.matrix_power(self.rotation, num_positions)
        rotated: Tensor = query.to(turned.dtype) @ turned
        return rotated.to(query.dtype)

    def check_model(self, model: "PreTrainedModel") -> None:
        """Raise ConfigError if this is not a trace of that model."""
        if fingerprint(model) != self.fingerprint:
            raise ConfigError(
                f"the trace was recorded from {self.model}, whose config or weights are not those of this "
                f"{type(model).__name__}; record one from it with `kvframe trace`"
            )


def choose_layers(retrieval_layers: Sequence[int], wanted: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers to record: those wanted, or four of the model's, evenly spaced.

    Raises ConfigError for a layer without a full KV cache.
    """
    if wanted is None:
        count = min(DEFAULT_LAYERS, len(retrieval_layers))
        return tuple(retrieval_layers[(2 * place + 1) * len(retrieval_layers) // (2 * count)] for place in range(count))
    for layer_idx in wanted:
        if layer_idx not in retrieval_layers:
            known = ", ".join(map(str, retrieval_layers))
            raise ConfigError(f"layer {layer_idx} keeps no full KV cache, or does not exist; those that do: {known}")
    return tuple(sorted(set(wanted)))


@torch.no_grad()
def record(
    model: "PreTrainedModel", sample: Sample, *, layers: Sequence[int] | None = None, max_bytes: int = MAX_BYTES
) -> Trace:
    """Read a sample's whole text once with full attention, and keep what some layers computed.

    layers: which; four of the model's, evenly spaced, without.
    max_bytes: the largest trace allowed.

    Raises ConfigError for a sample that the model cannot read, for layers that it does not have, and for a trace that
    would be too large, before anything runs.
    """
    from transformers import DynamicCache

    from kvframe.hf.queries import observe_queries
    from kvframe.hf.shape import model_shape
    from kvframe.hf.support import decoder_config, decoder_of

    check_length(model.config, sample.num_tokens, "the sample")
    shape = model_shape(model.config, model.dtype)
    chosen = choose_layers(shape.retrieval_layers, layers)
    # Of the last token nothing is ever read.
    ids = sample.ids[:, :-1].to(model.device)
    num_bytes = len(chosen) * ids.shape[1] * shape.dtype.itemsize
    num_bytes *= (shape.num_qo_heads + shape.num_kv_heads) * shape.head_dim + shape.num_kv_heads * shape.value_dim
    if num_bytes > max_bytes:
        raise ConfigError(
            f"the trace of {len(chosen)} layers over {ids.shape[1]} tokens takes {num_bytes / 2**30:.2f} GiB, "
            f"{max_bytes / 2**30:.2f} GiB are allowed; record fewer layers, or allow more"
        )
    queries: dict[int, Tensor] = {}

    def take(layer_idx: int, query: Tensor) -> None:
        if layer_idx in chosen:
            queries[layer_idx] = query[0].cpu()

    cache = DynamicCache(config=decoder_config(model))
    decoder: Any = decoder_of(model)
    with observe_queries(model, take):
        decoder(input_ids=ids, past_key_values=cache, use_cache=True)
    scales, filled = _scales(decoder), dict(enumerate[Any](cache.layers))
    found = [
        LayerTrace(
            layer_idx=layer_idx,
            sm_scale=scales.get(layer_idx, shape.head_dim**-0.5),
            query=queries[layer_idx],
            keys=filled[layer_idx].keys[0].cpu(),
            values=filled[layer_idx].values[0].cpu(),
        )
        for layer_idx in chosen
    ]
    return Trace(
        model=Path(model.config._name_or_path).name or type(model).__name__,
        fingerprint=fingerprint(model),
        shape=shape,
        turns=tuple(_turns(sample)),
        token_ids=ids[0].cpu(),
        layers=tuple(found),
        rotation=_rotation(decoder, shape.head_dim),
    )


def _scales(decoder: Any) -> dict[int, float]:
    """What the attention of each layer multiplies products with, where it says so."""
    found: dict[int, float] = {}
    for module in decoder.modules():
        layer_idx, scale = getattr(module, "layer_idx", None), getattr(module, "scaling", None)
        if isinstance(layer_idx, int) and isinstance(scale, int | float):
            found[layer_idx] = float(scale)
    return found


def _rotation(decoder: Any, head_dim: int) -> Tensor | None:
    from kvframe.hf.rope import relative_rotation

    rotate = relative_rotation(decoder)
    if rotate is None:
        return None
    device, dtype = decoder.device, torch.promote_types(decoder.dtype, torch.float32)
    # Turning is linear: the rows of the unit matrix say all of it.
    return rotate(torch.eye(head_dim, dtype=dtype, device=device)[None], 1)[0].cpu()


def _turns(sample: Sample) -> Iterator[tuple[int, int]]:
    """Tokens read as prompt and decode steps of every turn, as `run_forced` takes them."""
    carried = 0
    for turn in sample.turns:
        yield carried + len(turn.prompt_ids) - 1, len(turn.continuation_ids)
        carried = 1  # a turn's last token is read with the next prompt


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace to a safetensors file. Raises ConfigError, with no file left behind, where that cannot be done."""
    from safetensors.torch import save_file

    tensors = {"token_ids": trace.token_ids}
    if trace.rotation is not None:
        tensors["rotation"] = trace.rotation.contiguous()
    for layer in trace.layers:
        tensors |= {f"{part}.{layer.layer_idx}": getattr(layer, part).contiguous() for part in _PARTS}
    description = {
        "version": VERSION,
        "model": trace.model,
        "fingerprint": trace.fingerprint,
        "shape": attrs.asdict(trace.shape) | {"dtype": str(trace.shape.dtype).removeprefix("torch.")},
        "turns": trace.turns,
        "layers": {str(layer.layer_idx): layer.sm_scale for layer in trace.layers},
    }
    try:
        # Beside its place, so that a trace is there as a whole or not at all.
        with NamedTemporaryFile(dir=path.absolute().parent, prefix=".trace-", delete=False) as scratch:
            pass
        try:
            save_file(tensors, scratch.name, metadata={_KEY: json.dumps(description)})
            os.replace(scratch.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch.name)
            raise
    except Exception as error:
        # What a full disk raises is up to safetensors.
        raise ConfigError(f"cannot write the trace {path}: {error}") from error


def load_trace(path: Path) -> Trace:
    """Read a trace. Raises ConfigError for a file that is none, is broken, or is of another version."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if description is None:
                raise ConfigError(f"{path} is no trace: it does not say what it holds; record one with `kvframe trace`")
            if description.get("version") != VERSION:
                raise ConfigError(
                    f"{path} is a trace of version {description.get('version')}, this kvframe reads version {VERSION}; "
                    "record it anew with `kvframe trace`"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        shape = description["shape"]
        shape |= {"dtype": getattr(torch, shape["dtype"]), "retrieval_layers": tuple(shape["retrieval_layers"])}
        layers = [
            LayerTrace(
                layer_idx=int(layer_idx), sm_scale=scale, **{part: tensors[f"{part}.{layer_idx}"] for part in _PARTS}
            )
            for layer_idx, scale in description["layers"].items()
        ]
        trace = Trace(
            model=description["model"],
            fingerprint=description["fingerprint"],
            shape=ModelShape(**shape),
            turns=tuple((num_prompt, num_steps) for num_prompt, num_steps in description["turns"]),
            token_ids=tensors["token_ids"],
            layers=tuple(layers),
            rotation=tensors.get("rotation"),
        )
    except ConfigError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, OSError | SafetensorError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"cannot read the trace {path}: {reason}; expected a whole file that `kvframe trace` wrote"
        ) from error
    num_fed = sum(sum(turn) for turn in trace.turns)
    if any(getattr(layer, part).shape[1] != num_fed for layer in layers for part in _PARTS) or not layers:
        raise ConfigError(f"the trace {path} is broken: its layers do not hold {num_fed} tokens; record it anew")
    return trace
