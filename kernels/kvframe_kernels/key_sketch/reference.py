"""Plain torch definitions of a sketch of keys: encoding, decoding, `sketch_scores` and `window_sketch`."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from kvframe_kernels.packing import pack, unpack
from kvframe_kernels.unit_index.reference import leaving_rows


class Sketch(NamedTuple):
    """Keys in a few bits, a step each."""

    codes: Tensor
    """uint8 [..., ceil(D * bits / 8)], packed, the first number in the lowest bits."""
    step: Tensor
    """[..., 1], how far levels lie apart, in the dtype of the keys."""

    def named(self, prefix: str = "") -> dict[str, Tensor]:
        """Both by name, for a mapping that holds other tensors as well."""
        return {prefix + name: part for name, part in self._asdict().items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> "Sketch":
        """What `named` gave, out of such a mapping."""
        return cls(tensors[prefix + "codes"], tensors[prefix + "step"])


class Centres(NamedTuple):
    """Mean keys of units, from which sketched keys differ."""

    mean_keys: Tensor
    """[B, H, U, D]"""
    unit_ids: Tensor
    """int32 or int64 [B, H, C]: the unit of each candidate."""


def encode_sketch(keys: Tensor, bits: int, centres: Tensor | None = None, channels: Tensor | None = None) -> Sketch:
    """Keys [..., T, D] in `bits` a number, or, with `centres` of the same shape, what they differ from these by.

    Levels lie evenly and symmetrically about 0, the outermost at the key's largest number.

    channels: [..., D], what that is divided by before. Some channels of keys are many times as large as the others, in
    nearly every token (KIVI, 2024, arXiv 2402.02750; KVQuant, 2024, arXiv 2401.18079), and would set its step.
    """
    # In 16 bits a level of 8 would be off by more than the rounding to it.
    dtype = torch.promote_types(keys.dtype, torch.float32)
    numbers = keys.to(dtype) if centres is None else keys.to(dtype) - centres.to(dtype)
    if channels is not None:
        numbers = numbers / channels[..., None, :].to(dtype)
    most = 2**bits - 1
    step = (numbers.abs().amax(-1, keepdim=True) * (2 / most)).to(keys.dtype)
    levels = (numbers / step.to(dtype).masked_fill(step == 0, 1) + most / 2).round().clamp(0, most)
    return Sketch(pack(levels.to(torch.uint8), bits), step)


def decode_sketch(sketch: Sketch, bits: int, width: int, channels: Tensor | None = None) -> Tensor:
    """What `encode_sketch` was given, with the same channels, nearly: [..., T, width] in the dtype of the steps, which
    is at least float32 after it."""
    dtype = torch.promote_types(sketch.step.dtype, torch.float32)
    levels = unpack(sketch.codes, bits, width).to(dtype)
    middle: float = (2**bits - 1) / 2
    numbers = (levels - middle) * sketch.step.to(dtype)
    return numbers if channels is None else numbers * channels[..., None, :].to(dtype)


def sketch_scores_reference(
    query: Tensor,
    rows: Tensor,
    count: Tensor,
    sketch: Sketch,
    bits: int,
    sm_scale: float,
    *,
    channels: Tensor | None = None,
    centres: Centres | None = None,
    kept_lse: Tensor | None = None,
    due: Tensor | None = None,
) -> Tensor:
    """Of every candidate, its share of the attention to all candidates, by the sketches of their keys: softmax over the
    candidates for every query head, then the mean over the heads of a group.

    query: [B, Hq, D]; rows: int64 [B, H, C], the first count[b, h] of which are candidates, count int64 [B, H].
    sketch: of all rows, codes uint8 [B, H, R, ...] and step [B, H, R, 1]; channels: [B, H, D], as it was made with.
    With `centres`, a key is the mean key of its row's unit and its sketch; without, the sketch alone.
    kept_lse: [B, Hq], the log-sum-exp of what is attended to besides; shares are then of the attention to both.
    due: bool [B, H], where false nobody reads the result and rows and count may be anything; None is true.
    Returns [B, H, C] in at least float32, -inf where there is no candidate.
    """
    exists = torch.arange(rows.shape[-1], device=rows.device) < count[..., None]
    if due is not None:
        exists = exists & due[..., None]
    place = torch.where(exists, rows, 0)
    codes, step = (part.gather(2, place[..., None].expand(*rows.shape, part.shape[-1])) for part in sketch)
    keys = decode_sketch(Sketch(codes, step), bits, query.shape[-1], channels)  # [B, H, C, D]
    grouped = query.to(keys.dtype).reshape(*rows.shape[:2], -1, query.shape[-1]) * sm_scale  # [B, H, G, D]
    products = torch.matmul(grouped, keys.transpose(2, 3))
    if centres is not None:
        of_centres = torch.matmul(grouped, centres.mean_keys.to(keys.dtype).transpose(2, 3))  # [B, H, G, U]
        unit = torch.where(exists, centres.unit_ids, 0).long()[:, :, None].expand_as(products)
        products = products + of_centres.gather(-1, unit)
    products = products.masked_fill(~exists[:, :, None], -math.inf)
    if kept_lse is None:
        shares = products.softmax(-1)
    else:
        besides = kept_lse.to(products.dtype).view(*products.shape[:3], 1)
        shares = torch.cat([products, besides], -1).softmax(-1)[..., :-1]
    # A head without any candidate would be 0/0.
    return shares.nan_to_num(0.0).mean(2).masked_fill(~exists, -math.inf)


def window_sketch_reference(
    sketch: Sketch,
    bits: int,
    leaves: Tensor,
    start: Tensor,
    size: Tensor,
    buffer: Tensor,
    first: int,
    ring_size: int,
    *,
    centred: bool,
    channels: Tensor | None = None,
) -> None:
    """Enter the sketches of the keys of a unit that leaves the window into their rows, in place.

    sketch: of all rows, codes uint8 [B, H, R, ...] and step [B, H, R, 1]; leaves: bool [B, H]; start, size: int64
    [B, H], a unit is the rows [start, start + size). buffer: [B, H, N, D], whose slots from `first` on are a ring of
    `ring_size`: the key of row r is buffer[b, h, first + r % ring_size]. A unit has at most `ring_size` rows.
    centred: sketch the difference to the mean key of the unit, as that is in the dtype of the keys; channels: [B, H,
    D], what it is divided by.
    Nothing is written where not `leaves`, nor for a row outside [0, R).
    """
    found = leaving_rows(leaves, start, size, buffer, first, ring_size)
    num_rows = sketch.codes.shape[2]
    if found is None or num_rows == 0:
        return
    keys, inside = found
    centre = None
    if centred:
        # Not by a product: a slot outside the unit may hold anything.
        own = torch.where(inside, keys, 0).to(torch.promote_types(keys.dtype, torch.float32))
        centre = (own.sum(2, keepdim=True) / size.clamp(min=1)[..., None, None]).to(keys.dtype)
    rows = start[..., None] + torch.arange(keys.shape[2], device=start.device)
    writes = inside[..., 0] & leaves[..., None] & (rows >= 0) & (rows < num_rows)
    batch, head, entry = writes.nonzero(as_tuple=True)
    for tensor, part in zip(sketch, encode_sketch(keys, bits, centre, channels), strict=True):
        tensor[batch, head, rows[batch, head, entry]] = part[batch, head, entry]
