"""What this machine offers, and what kvframe makes of it."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

_PACKAGES = ("kvframe", "torch", "transformers", "triton", "pluggy", "attrs")
_LINK_BYTES = 256 * 2**20
_LINK_COPIES = 4


def examine() -> dict[str, Any]:
    """Versions, devices, memory, link, plugins and kernel backends, as plain data.

    On CUDA it copies 256 MiB some times, to measure the link. Raises PluginError where a plugin is at fault.
    """
    import torch

    from kvframe.memory.available import available_host_memory
    from kvframe.registry import default_registry

    plugins = default_registry().plugins.describe()
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "cuda": _cuda(torch),
        "pinned_memory": _pinned(torch),
        "link": _link(torch),
        "host": {
            "memory_available_bytes": available_host_memory(),
            "threads": torch.get_num_threads(),
            "control_group": _control_group(Path("/sys/fs/cgroup")),
        },
        "plugins": plugins,
        "kernels": _kernels(plugins, on_cuda=torch.cuda.is_available()),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cuda(torch: Any) -> dict[str, Any]:
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device was found"
        return {"available": False, "reason": reason, "version": torch.version.cuda, "devices": []}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "available": True,
        "reason": None,
        "version": torch.version.cuda,
        "devices": [{"name": device.name, "memory_bytes": device.total_memory} for device in devices],
    }


def _pinned(torch: Any) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"available": False, "reason": "without a CUDA device the host pool is ordinary memory"}
    try:
        pinned = bool(torch.empty(1, pin_memory=True).is_pinned())
    except RuntimeError as error:
        return {"available": False, "reason": str(error).splitlines()[0]}
    return {"available": pinned, "reason": None if pinned else "torch gives ordinary memory where pinned was asked for"}


def _link(torch: Any) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"measured": False, "reason": "without a CUDA device there is no link"}
    try:
        host = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(_LINK_BYTES, dtype=torch.uint8, device="cuda")
    except RuntimeError as error:
        return {"measured": False, "reason": str(error).splitlines()[0]}
    rates = {}
    for name, source, target in (("host_to_device", host, device), ("device_to_host", device, host)):
        target.copy_(source)
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(_LINK_COPIES):
            target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        rates[f"{name}_gb_per_s"] = _LINK_COPIES * _LINK_BYTES / (perf_counter() - start) / 1e9
    return {"measured": True, "reason": None, "bytes": _LINK_BYTES, **rates}


def _control_group(root: Path) -> dict[str, float | None]:
    """Limits of the control group (version 2); None where there is none."""
    memory, cpus = _read(root / "memory.max"), _read(root / "cpu.max")
    limit = int(memory[0]) if memory and memory[0].isdigit() else None
    share = int(cpus[0]) / int(cpus[1]) if len(cpus) == 2 and cpus[0].isdigit() else None
    return {"memory_bytes": limit, "cpus": share}


def _read(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []


def _kernels(plugins: list[dict[str, Any]], *, on_cuda: bool) -> dict[str, dict[str, str]]:
    """For every operation, which implementation `backend="auto"` runs here, and why."""
    import kvframe_kernels
    from kvframe_kernels.dispatch import missing

    found = {}
    for folder in Path(kvframe_kernels.__path__[0]).iterdir():
        if not (folder / "reference.py").is_file():
            continue
        own = [kind for kind in ("cuda", "triton") if (folder / f"{kind}_kernel.py").is_file()]
        lacks = {kind: reason for kind in own if (reason := missing(kind)) is not None}
        if not on_cuda:
            how = "reference", "plain torch; there is no CUDA device"
        elif len(lacks) == len(own):
            how = "reference", "; ".join(lacks.values()) or "there is no kernel of its own"
        else:
            kind = next(kind for kind in own if kind not in lacks)
            how = kind, "its kernel; plain torch for shapes and dtypes that it does not serve"
        found[folder.name] = {"backend": how[0], "reason": how[1]}
    if not on_cuda:
        reason = "torch's fused attention; the reference where its log-sum-exp is asked for"
        found["slot_attention"] = {"backend": "sdpa", "reason": reason}
    rivals = [plugin["name"] for plugin in plugins if "kvframe_attention_backend" in plugin["hooks"]]
    if rivals:
        found["slot_attention"]["reason"] += f"; asked before, layer by layer: {', '.join(rivals)}"
    return dict(sorted(found.items()))
