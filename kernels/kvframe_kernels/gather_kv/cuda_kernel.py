"""`gather_kv` in CUDA C++ (gather_kv.cu), compiled by NVRTC through cuda.core."""

import functools
from importlib import resources
from typing import Any

import torch
from torch import Tensor

try:
    from cuda.core import Device, LaunchConfig, Program, ProgramOptions, Stream, launch
except ImportError:  # its place before cuda.core 0.5
    from cuda.core.experimental import Device, LaunchConfig, Program, ProgramOptions, Stream, launch

# As in gather_kv.cu.
_THREADS = 512
_VECTOR = 16
_LANES = 32

# 12 blocks saturate a PCIe 5 x16 link with rows of 8 KB. Four times as many leave slack for shorter rows and for blocks
# that find little to do, and still take a third of an H200's 132 SMs at most.
_DEFAULT_BLOCKS = 48


def gather_kv_cuda(
    pool: Tensor, incoming: Tensor, first_row: int, k_slots: Tensor, v_slots: Tensor, num_blocks: int | None
) -> None:
    """Arguments as in `gather_kv_reference`; rows of a head dense, heads aligned to 16 bytes, at least one slot."""
    _, num_heads, capacity, head_dim = k_slots.shape
    num_slots = incoming.numel()
    incoming = incoming.contiguous()
    num_elements = _VECTOR // pool.element_size()
    # More blocks than there are warps' worth of slots would find nothing.
    grid = min(num_blocks or _DEFAULT_BLOCKS, -(-num_slots // _LANES))
    index = k_slots.device.index
    with torch.cuda.device(index):
        # torch leaves a thread without a context until it needs one, and a launch into the default stream needs it.
        Device(index).set_current()
        launch(
            _stream(torch.cuda.current_stream().cuda_stream), _config(grid), _compiled(index)[0],
            pool.data_ptr(), incoming.data_ptr(), k_slots.data_ptr(), v_slots.data_ptr(),
            int(first_row), pool.shape[2], num_slots, capacity, num_heads,
            pool.stride(0) // num_elements, pool.stride(1) // num_elements,
            k_slots.stride(0) // num_elements, k_slots.stride(1) // num_elements,
            v_slots.stride(0) // num_elements, v_slots.stride(1) // num_elements,
            head_dim // num_elements, v_slots.shape[-1] // num_elements,
        )  # fmt: skip


@functools.cache
def _compiled(index: int) -> tuple[Any, Any]:
    """The kernel for a device, and the module that holds it; the device's context is current."""
    source = resources.files("kvframe_kernels.gather_kv").joinpath("gather_kv.cu").read_text(encoding="utf-8")
    major, minor = torch.cuda.get_device_capability(index)
    options = ProgramOptions(std="c++17", arch=f"sm_{major}{minor}")
    module = Program(source, code_type="c++", options=options).compile("cubin")
    return module.get_kernel("gather_kv"), module


@functools.lru_cache(maxsize=64)
def _stream(handle: int) -> Any:
    """A stream of torch's. Only the handle is kept, so that an old entry is right for a new stream at its address."""
    return Stream.from_handle(handle)


@functools.lru_cache(maxsize=64)
def _config(grid: int) -> Any:
    return LaunchConfig(grid=grid, block=_THREADS)
