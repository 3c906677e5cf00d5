"""How many tokens of each unit attention does not see."""

from torch import Tensor

from kvframe_kernels.dispatch import Backend, choose
from kvframe_kernels.unattended_tokens.reference import unattended_tokens_reference

__all__ = ["unattended_tokens", "unattended_tokens_reference"]


def unattended_tokens(
    resident_rows: Tensor, unit_offsets: Tensor, num_units: Tensor, max_units: int, *, backend: Backend = "auto"
) -> Tensor:
    """`unattended_tokens_reference`, by the chosen backend."""
    if choose("unattended_tokens", resident_rows, backend, None, kernels=("triton",)) == "reference":
        return unattended_tokens_reference(resident_rows, unit_offsets, num_units, max_units)
    from kvframe_kernels.unattended_tokens.triton_kernel import unattended_tokens_triton

    return unattended_tokens_triton(resident_rows, unit_offsets, num_units, max_units)
