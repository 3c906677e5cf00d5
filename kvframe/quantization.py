"""Numbers in a few bits: asymmetric rounding between the smallest and the largest of a group, packed into bytes.

The rounding of KIVI (2024, arXiv 2402.02750): with b bits, x becomes round((x - min) / step), step = (max - min) /
(2^b - 1).
"""

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor


@frozen(eq=False)
class Rounded:
    """Groups of numbers, each rounded to multiples of its own step above its own smallest."""

    codes: Tensor
    """uint8 [..., N], less than 2^bits"""
    step: Tensor
    """[..., 1], in the dtype of the numbers; 0 where all numbers of a group are the same."""
    least: Tensor
    """[..., 1]"""

    def restore(self) -> Tensor:
        """[..., N], what the codes stand for."""
        return restore(self.codes, self.step, self.least)


def round_groups(numbers: Tensor, bits: int) -> Rounded:
    """Round groups of numbers [..., N], one group in the last dimension."""
    least, most = numbers.aminmax(dim=-1, keepdim=True)
    # In 16 bits a code of 8 would be off by more than the rounding itself, and the range could overflow.
    dtype = torch.promote_types(numbers.dtype, torch.float32)
    step = ((most.to(dtype) - least.to(dtype)) / (2**bits - 1)).to(numbers.dtype)
    steps = (numbers.to(dtype) - least.to(dtype)) / step.masked_fill(step == 0, 1).to(dtype)
    return Rounded(steps.round_().clamp_(0, 2**bits - 1).to(torch.uint8), step, least)


def restore(codes: Tensor, step: Tensor, least: Tensor) -> Tensor:
    """What codes stand for, in the dtype of step and least, which broadcast."""
    dtype = torch.promote_types(step.dtype, torch.float32)
    return (codes.to(dtype) * step.to(dtype) + least.to(dtype)).to(step.dtype)


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
