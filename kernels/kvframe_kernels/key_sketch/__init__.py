"""Keys in a few bits on the device, close enough to rank tokens by."""

from torch import Tensor

from kvframe_kernels.dispatch import Backend, choose, float_reason, width_reason
from kvframe_kernels.key_sketch.reference import (
    Centres,
    Sketch,
    decode_sketch,
    encode_sketch,
    sketch_scores_reference,
    window_sketch_reference,
)

__all__ = [
    "Centres",
    "Sketch",
    "decode_sketch",
    "encode_sketch",
    "sketch_scores",
    "sketch_scores_reference",
    "window_sketch",
    "window_sketch_reference",
]


def sketch_scores(
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
    backend: Backend = "auto",
) -> Tensor:
    """`sketch_scores_reference`, by the chosen backend; a kernel leaves the result as it finds it where not due."""
    reason = float_reason(query, sketch.step) or width_reason(query.shape[-1])
    if sketch.codes.stride(-1) != 1:
        reason = reason or "the kernel serves codes that lie side by side"
    if centres is not None:
        if centres.mean_keys.dtype != query.dtype:
            reason = reason or f"the kernel serves one dtype, not {query.dtype} and {centres.mean_keys.dtype}"
        if centres.mean_keys.stride(-1) != 1:
            reason = reason or "the kernel serves mean keys whose numbers lie side by side"
    if choose("sketch_scores", query, backend, reason, kernels=("triton",)) == "reference":
        return sketch_scores_reference(
            query, rows, count, sketch, bits, sm_scale, channels=channels, centres=centres, kept_lse=kept_lse, due=due
        )
    from kvframe_kernels.key_sketch.triton_kernel import sketch_scores_triton

    return sketch_scores_triton(query, rows, count, sketch, bits, sm_scale, channels, centres, kept_lse, due)


def window_sketch(
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
    backend: Backend = "auto",
) -> None:
    """`window_sketch_reference`, by the chosen backend."""
    reason = float_reason(buffer, sketch.step) or width_reason(buffer.shape[-1])
    if buffer.stride(-1) != 1 or sketch.codes.stride(-1) != 1:
        reason = reason or "the kernel serves rows whose numbers lie side by side"
    if choose("window_sketch", buffer, backend, reason, kernels=("triton",)) == "reference":
        window_sketch_reference(
            sketch, bits, leaves, start, size, buffer, first, ring_size, centred=centred, channels=channels
        )
        return
    from kvframe_kernels.key_sketch.triton_kernel import window_sketch_triton

    window_sketch_triton(sketch, bits, leaves, start, size, buffer, first, ring_size, centred, channels)
