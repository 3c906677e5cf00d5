"""How much memory there is, on the host and on a device."""

from pathlib import Path

import torch


def available_host_memory() -> int | None:
    """Bytes a process may still take without swapping; None where the system does not say.

    The smaller of the kernel's estimate and what the control group leaves.
    """
    limits = [limit for limit in (_meminfo(), _control_group()) if limit is not None]
    return min(limits, default=None)


def available_device_memory(device: torch.device) -> int:
    """Bytes that torch may still take on a CUDA device, within the process's own limit if it has one."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    fraction: float = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device)
    limit = int(fraction * total) - reserved
    return max(0, min(free, limit)) + reserved - allocated


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    value = fields.get("MemAvailable")
    return int(value.split()[0]) * 1024 if value else None


def _control_group() -> int | None:
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used)
