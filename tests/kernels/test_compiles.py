"""Every Triton kernel through the compiler's front end for a Hopper GPU, which it takes no GPU to ask.

The interpreter runs what the compiler refuses: a variable that changes its type in a loop, a shape it does not know.
"""

import importlib
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve

import kvframe_kernels
from kvframe.bench.case import KernelSizes
from kvframe.bench.kernel_cases import make_cases
from kvframe_kernels.dispatch import is_interpreted

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled and run in tests/kernels/triton"),
    pytest.mark.skipif(is_interpreted(), reason="nothing is compiled in the interpreter"),
]

# Not run for a floor or a figure: small, and of more than one tile.
SIZES = KernelSizes(
    device=torch.device("cpu"), dtype=torch.bfloat16, num_qo_heads=8, num_kv_heads=2, head_dim=64, context=1024,
    token_budget=64, sink_size=4, window_size=16, max_segment=8, num_slots=300, attention_batches=(1,),
    prompts=(256,), block_size=128, num_iterations=1, spread=0,
)  # fmt: skip


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of kernels that have been compiled to Triton's own IR; a launch compiles and does nothing else."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: set[str] = set()
    target = GPUTarget("cuda", 90, 32)

    def compile_front(src: Any, target: Any, options: dict[str, Any]) -> Any:
        backend = compiler.make_backend(target)
        parsed, context = backend.parse_options(dict(options)), compiler.ir.context()
        compiler.ir.load_dialects(context)
        backend.load_dialects(context)
        stages: dict[str, Any] = {}
        backend.add_stages(stages, parsed, src.language)
        implementation, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
        module = src.make_ir(target, parsed, implementation, modules, context)
        stages["ttir"](module, {})
        found.add(src.fn.__name__)
        return SimpleNamespace()

    launch = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(kernel, *args, grid=grid, warmup=True, **options)

    # A device that nothing else is made for, so that nothing made here is taken for a kernel that can run.
    device = object()
    active = SimpleNamespace(
        get_current_device=lambda: device, get_current_stream=lambda _: 0, get_current_target=lambda: target
    )
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr("triton.compiler.compile", compile_front)
    monkeypatch.setattr(JITFunction, "run", run)

    def choose(op: str, tensor: Any, backend: str, reason: str | None, *, kernels: tuple[str, ...]) -> str:
        return "triton" if reason is None and "triton" in kernels else "reference"

    for module in pkgutil.iter_modules(kvframe_kernels.__path__):
        op = importlib.import_module(f"kvframe_kernels.{module.name}")
        if module.ispkg:
            monkeypatch.setattr(op, "choose", choose)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiles(compiled: set[str], dtype: torch.dtype) -> None:
    """Every operation of a step that `kvframe bench kernels` measures."""
    for make in make_cases(evolve(SIZES, dtype=dtype)):
        for case in make():
            # What k-means and means of prompts make of a launch that does nothing would lead nowhere.
            if case.in_graph and not case.op.startswith("(bench)"):
                case.calls[0]()

    assert compiled >= {
        "_append_token_kernel", "_attend_kernel", "_exchange_resident_kernel", "_gather_kv_kernel", "_kept_lse_kernel",
        "_missed_share_kernel", "_products_kernel", "_reduce_kernel", "_select_units_kernel", "_sketch_products_kernel",
        "_unattended_tokens_kernel", "_window_mean_kernel", "_window_sketch_kernel",
    }  # fmt: skip
