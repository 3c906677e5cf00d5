"""How much host memory there is."""

from pathlib import Path


def available_host_memory() -> int | None:
    """Bytes a process may still take without swapping; None where the system does not say.

    The smaller of the kernel's estimate and what the control group leaves.
    """
    limits = [limit for limit in (_meminfo(), _control_group()) if limit is not None]
    return min(limits, default=None)


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
