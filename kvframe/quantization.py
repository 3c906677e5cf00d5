"""Numbers in a few bits: asymmetric rounding between the smallest and the largest of a group.

The rounding of KIVI (2024, arXiv 2402.02750): with b bits, x becomes round((x - min) / step), step = (max - min) /
(2^b - 1).
"""

import torch
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
