"""Keys in a few bits, close enough to rank tokens by."""

import torch
from torch import Tensor

from kvframe.quantization import pack, unpack


def encode_sketch(keys: Tensor, bits: int) -> dict[str, Tensor]:
    """Keys [..., D] as codes, uint8 [..., ceil(D * bits / 8)], and one step each, [..., 1] in the keys' dtype.

    Levels lie evenly and symmetrically about 0, the outermost at the key's largest number.
    """
    most = 2**bits - 1
    step = keys.abs().amax(-1, keepdim=True) * (2 / most)
    levels = (keys / step.masked_fill(step == 0, 1) + most / 2).round().clamp(0, most)
    return {"codes": pack(levels.to(torch.uint8), bits), "step": step}


def decode_sketch(codes: Tensor, step: Tensor, bits: int, width: int) -> Tensor:
    """What `encode_sketch` made, as keys [..., width] in the dtype of the steps, which is at least float32 after it."""
    dtype = torch.promote_types(step.dtype, torch.float32)
    levels = unpack(codes, bits, width).to(dtype)
    middle: float = (2**bits - 1) / 2
    return (levels - middle) * step.to(dtype)
