"""Keys in a few bits, close enough to rank tokens by."""

import torch
from torch import Tensor

from kvframe.quantization import pack, unpack


def encode_sketch(keys: Tensor, bits: int, channels: Tensor | None = None) -> dict[str, Tensor]:
    """Keys [..., T, D] as codes, uint8 [..., T, ceil(D * bits / 8)], and one step each, [..., T, 1] in the keys' dtype.

    Levels lie evenly and symmetrically about 0, the outermost at the key's largest number.

    channels: [..., D], what keys are divided by before. Some channels of keys are many times as large as the others, in
    nearly every token (KIVI, 2024, arXiv 2402.02750; KVQuant, 2024, arXiv 2401.18079), and would set its step.
    """
    if channels is not None:
        keys = (keys / channels[..., None, :]).to(keys.dtype)
    most = 2**bits - 1
    step = keys.abs().amax(-1, keepdim=True) * (2 / most)
    levels = (keys / step.masked_fill(step == 0, 1) + most / 2).round().clamp(0, most)
    return {"codes": pack(levels.to(torch.uint8), bits), "step": step}


def decode_sketch(codes: Tensor, step: Tensor, bits: int, width: int) -> Tensor:
    """What `encode_sketch` made, as keys [..., width] in the dtype of the steps, which is at least float32 after it.

    Where the keys were divided by the sizes of channels, so are these.
    """
    dtype = torch.promote_types(step.dtype, torch.float32)
    levels = unpack(codes, bits, width).to(dtype)
    middle: float = (2**bits - 1) / 2
    return (levels - middle) * step.to(dtype)
