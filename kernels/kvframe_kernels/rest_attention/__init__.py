"""What is not retrieved, estimated: one virtual entry a unit."""

from torch import Tensor

from kvframe_kernels.rest_attention.reference import rest_attention_reference, unattended_tokens_reference

__all__ = ["rest_attention", "rest_attention_reference", "unattended_tokens", "unattended_tokens_reference"]


def unattended_tokens(resident_rows: Tensor, unit_offsets: Tensor, num_units: Tensor, max_units: int) -> Tensor:
    """`unattended_tokens_reference`."""
    return unattended_tokens_reference(resident_rows, unit_offsets, num_units, max_units)


def rest_attention(
    query: Tensor, mean_keys: Tensor, mean_values: Tensor, rest: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """`rest_attention_reference`."""
    return rest_attention_reference(query, mean_keys, mean_values, rest, sm_scale)
