"""Which implementation of an op runs: the plain torch reference, or a kernel.

Every op takes `backend=`. "auto" is the reference on a CPU, and on a CUDA device the fastest kernel that serves the
call; where none does, the reference runs and one warning says why. A kernel that is named and cannot run is an error.
"""

import functools
import os
import warnings
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "triton", "cuda"]
Kernel = Literal["triton", "cuda"]


class KernelError(RuntimeError):
    """A kernel that was asked for by name cannot run, or was given what it must not be given."""


class FallbackWarning(UserWarning):
    """An op runs its plain torch reference on a device that has kernels."""


def choose(op: str, tensor: Tensor, backend: Backend, reason: str | None, *, kernels: tuple[Kernel, ...]) -> str:
    """What runs an op whose tensors lie where `tensor` does: "reference" or one of `kernels`.

    reason: why the kernels do not serve this call; None where they do.
    kernels: those the op has, the preferred one first.

    Raises KernelError where `backend` names a kernel that does not exist or cannot run here.
    """
    on_cpu = tensor.device.type == "cpu"
    if backend == "reference" or (backend == "auto" and on_cpu):
        return "reference"
    if backend == "auto":
        reason = reason or missing(kernels[-1])
        if reason is not None:
            _warn_once(op, reason)
            return "reference"
        return next(kernel for kernel in kernels if missing(kernel) is None)
    if backend not in kernels:
        raise KernelError(f"{op} has no {backend!r} kernel; expected one of: auto, reference, {', '.join(kernels)}")
    if on_cpu and not (backend == "triton" and is_interpreted()):
        reason = "its tensors lie on the CPU; move them to a CUDA device, or set TRITON_INTERPRET=1 before the import"
    reason = reason or missing(backend)
    if reason is not None:
        raise KernelError(f"{op} cannot run its {backend!r} kernel: {reason}")
    return backend


def is_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors; decided when they were first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def missing(kernel: str) -> str | None:
    """Why no kernel of a kind can run here."""
    module = "triton" if kernel == "triton" else "cuda.core"
    try:
        __import__(module)
    except ImportError as error:
        return f"{module} is not installed ({error})"
    return None


@functools.cache
def _warn_once(op: str, reason: str) -> None:
    warnings.warn(f"{op} runs its plain torch reference: {reason}", FallbackWarning, stacklevel=4)


@functools.cache
def is_debug() -> bool:
    """Whether ops check their arguments' contents, which makes the host wait for the device: KVFRAME_DEBUG=1."""
    return os.environ.get("KVFRAME_DEBUG", "0") not in ("", "0")


def float_reason(*tensors: Tensor) -> str | None:
    """Why kernels do not serve the dtype of these tensors; None where they do."""
    served = (torch.float16, torch.bfloat16, torch.float32)
    for tensor in tensors:
        if tensor.dtype not in served:
            return f"kernels serve float16, bfloat16 and float32, not {tensor.dtype}"
    return None


def width_reason(*widths: int) -> str | None:
    """Why kernels do not serve heads of these widths; None where they do."""
    for width in widths:
        if width % 16 or width > 256:
            return f"kernels serve head widths that are multiples of 16 up to 256, not {width}"
    return None
