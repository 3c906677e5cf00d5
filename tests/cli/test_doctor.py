"""`kvframe doctor`."""

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

import kvframe
import kvframe_kernels
from kvframe import doctor

Run = Callable[..., Result]
RunJson = Callable[..., Any]

OPS = {module.name for module in pkgutil.iter_modules(kvframe_kernels.__path__) if module.ispkg}


def test_doctor_as_json(run_json: RunJson) -> None:
    """Versions, devices, memory, link, plugins and a backend with its reason for every operation."""
    found = run_json("doctor")

    assert found["versions"]["kvframe"] == kvframe.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"].keys() >= {"python", "transformers", "triton"}
    assert found["cuda"]["available"] is torch.cuda.is_available()
    assert found["pinned_memory"]["available"] is torch.cuda.is_available()
    assert found["link"]["measured"] is torch.cuda.is_available()
    assert found["host"]["memory_available_bytes"] > 0 and found["host"]["threads"] >= 1
    assert {plugin["name"] for plugin in found["plugins"]} == {"core", "baselines", "louis"}
    assert found["kernels"].keys() == OPS and {"kmeans", "slot_attention"} <= OPS
    assert all(how["backend"] and how["reason"] for how in found["kernels"].values())


def test_doctor_as_text(run: Run) -> None:
    """Each of them has a line."""
    text = run("doctor").stdout

    labels = ("python", "torch", "CUDA", "pinned memory", "host-device link", "host memory", "control group, memory")
    lines = text.splitlines()
    for label in (*labels, "plugin louis", *(f"kernel {op}" for op in OPS)):
        assert any(line.startswith(label) for line in lines), label
    assert all(len(line.split()) >= 2 for line in lines)


class FakeCuda:
    """Answers as torch does where there is a GPU; memory is that of the host."""

    uint8 = torch.uint8

    class version:
        cuda = "13.0"

    class cuda:
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 1)
        synchronize = staticmethod(lambda: None)

        @staticmethod
        def get_device_properties(index: int) -> Any:
            return type("Properties", (), {"name": "GPU of the test", "total_memory": 24 << 30})

    @staticmethod
    def empty(size: int, **options: Any) -> torch.Tensor:
        return torch.zeros(min(size, 1024), dtype=torch.uint8)


def test_what_a_gpu_would_say() -> None:
    """The device by name, and both directions of the link."""
    link = doctor._link(FakeCuda)

    assert doctor._cuda(FakeCuda)["devices"] == [{"name": "GPU of the test", "memory_bytes": 24 << 30}]
    assert link["measured"] and link["host_to_device_gb_per_s"] > 0 and link["device_to_host_gb_per_s"] > 0


def test_pinned_memory_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the driver refuses, its reason is told."""

    def refuse(*size: int, **options: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nand much more")

    monkeypatch.setattr(FakeCuda, "empty", staticmethod(refuse))

    expected = "CUDA error: out of memory"
    assert doctor._pinned(FakeCuda) == {"available": False, "reason": expected}
    assert doctor._link(FakeCuda) == {"measured": False, "reason": expected}


@pytest.mark.parametrize(
    "memory, cpus, expected",
    [
        ("max\n", "max 100000\n", {"memory_bytes": None, "cpus": None}),
        ("2147483648\n", "150000 100000\n", {"memory_bytes": 2 << 30, "cpus": 1.5}),
        (None, None, {"memory_bytes": None, "cpus": None}),
    ],
)
def test_control_group(memory: str | None, cpus: str | None, expected: dict[str, Any], tmp_path: Path) -> None:
    """Limits as the kernel writes them."""
    for name, text in (("memory.max", memory), ("cpu.max", cpus)):
        if text is not None:
            (tmp_path / name).write_text(text)

    assert doctor._control_group(tmp_path) == expected


@pytest.mark.parametrize("lacking, gather, others", [((), "cuda", "triton"), (("cuda",), "triton", "triton")])
def test_kernels_on_a_device(
    lacking: tuple[str, ...], gather: str, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest kernel that each operation has and that can be loaded; without any, plain torch and why."""
    from kvframe_kernels import dispatch

    monkeypatch.setattr(dispatch, "missing", lambda kind: f"{kind} is not installed" if kind in lacking else None)
    found = doctor._kernels([], on_cuda=True)

    assert found.keys() == OPS
    folder = Path(kvframe_kernels.__path__[0])
    have = {op for op in OPS if (folder / op / "triton_kernel.py").is_file()}
    assert {how["backend"] for op, how in found.items() if op in have - {"gather_kv"}} == {others}
    assert {how["backend"] for op, how in found.items() if op not in have} <= {"reference"}
    assert found["gather_kv"]["backend"] == gather
    monkeypatch.setattr(dispatch, "missing", lambda kind: f"{kind} is not installed")
    assert all(how["backend"] == "reference" for how in doctor._kernels([], on_cuda=True).values())
