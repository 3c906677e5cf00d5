"""What is not retrieved, estimated: one virtual entry a unit."""

from torch import Tensor

from kvframe_kernels.dispatch import Backend, choose
from kvframe_kernels.rest_attention.reference import rest_attention_reference, unattended_tokens_reference
from kvframe_kernels.slot_attention import unserved

__all__ = ["rest_attention", "rest_attention_reference", "unattended_tokens", "unattended_tokens_reference"]


def unattended_tokens(
    resident_rows: Tensor, unit_offsets: Tensor, num_units: Tensor, max_units: int, *, backend: Backend = "auto"
) -> Tensor:
    """`unattended_tokens_reference`, by the chosen backend."""
    if choose("unattended_tokens", resident_rows, backend, None, kernels=("triton",)) == "reference":
        return unattended_tokens_reference(resident_rows, unit_offsets, num_units, max_units)
    from kvframe_kernels.rest_attention.triton_kernel import unattended_tokens_triton

    return unattended_tokens_triton(resident_rows, unit_offsets, num_units, max_units)


def rest_attention(
    query: Tensor,
    mean_keys: Tensor,
    mean_values: Tensor,
    rest: Tensor,
    sm_scale: float,
    *,
    arrivals: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`rest_attention_reference`, by the chosen backend.

    arrivals: scratch of the kernel, as in `slot_attention`; the same one will do for both, one after the other.

    "auto" is the kernel for a single query on a CUDA device, and the reference elsewhere.
    """
    # Several queries are rare, proposed tokens alone, so nothing is amiss where the reference runs.
    if query.shape[2] == 1 or backend != "auto":
        reason = unserved(query, mean_keys, mean_values)
        if choose("rest_attention", query, backend, reason, kernels=("triton",)) == "triton":
            from kvframe_kernels.rest_attention.triton_kernel import rest_attention_triton

            return rest_attention_triton(query, mean_keys, mean_values, rest, sm_scale, arrivals)
    return rest_attention_reference(query, mean_keys, mean_values, rest, sm_scale)
