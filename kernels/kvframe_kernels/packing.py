"""Codes of a few bits in bytes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_size(num_codes: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return -(-num_codes * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., N], each less than 2^bits, to uint8 [..., packed_size]; the first code in the lowest bits."""
    per_byte = 8 // bits
    padded = F.pad(codes, (0, -codes.shape[-1] % per_byte))
    padded = padded.reshape(*codes.shape[:-1], -1, per_byte)
    packed = padded[..., 0]
    for place in range(1, per_byte):
        packed = packed | padded[..., place] << bits * place
    return packed


def unpack(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """What `pack` was given: uint8 [..., num_codes]."""
    places = [packed >> bits * place & 2**bits - 1 for place in range(8 // bits)]
    return torch.stack(places, -1).flatten(-2)[..., :num_codes]
