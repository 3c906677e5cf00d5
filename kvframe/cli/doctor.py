"""`kvframe doctor`: what a bug report should say."""

from typing import Any

from kvframe.cli.console import out, print_json, waiting
from kvframe.cli.listing import JSON


def doctor(json: JSON = False) -> None:
    """Versions, CUDA, pinned memory, link bandwidth, plugins, and which kernel backend runs, and why."""
    from kvframe.doctor import examine

    with waiting("measuring", quiet=json):
        found = examine()
    if json:
        print_json(found)
        return
    console = out()
    for label, text in _lines(found):
        console.print(f"{label:<24}{text}", markup=False)


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [(name, text or "not installed") for name, text in found["versions"].items()]
    cuda, pinned, link, host = found["cuda"], found["pinned_memory"], found["link"], found["host"]
    if cuda["available"]:
        lines.append(("CUDA", cuda["version"]))
        lines += [
            (f"  device {i}", f"{device['name']}, {_size(device['memory_bytes'])}")
            for i, device in enumerate(cuda["devices"])
        ]
    else:
        lines.append(("CUDA", f"no: {cuda['reason']}"))
    lines.append(("pinned memory", "yes" if pinned["available"] else f"no: {pinned['reason']}"))
    if link["measured"]:
        up, down = link["host_to_device_gb_per_s"], link["device_to_host_gb_per_s"]
        lines.append(
            ("host-device link", f"{up:.1f} GB/s to the device, {down:.1f} GB/s back, {link['bytes'] >> 20} MiB")
        )
    else:
        lines.append(("host-device link", f"not measured: {link['reason']}"))
    lines.append(("host memory", f"{_size(host['memory_available_bytes'])} available"))
    lines.append(("CPU threads of torch", str(host["threads"])))
    limits = host["control_group"]
    memory, cpus = limits["memory_bytes"], limits["cpus"]
    lines.append(("control group, memory", "no limit" if memory is None else _size(memory)))
    lines.append(("control group, CPUs", "no limit" if cpus is None else f"{cpus:g}"))
    for plugin in found["plugins"]:
        state = "" if plugin["enabled"] else ", left out by KVFRAME_DISABLE_PLUGINS"
        lines.append((f"plugin {plugin['name']}", f"{plugin['distribution']} {plugin['version']}{state}"))
    lines += [(f"kernel {op}", f"{how['backend']}: {how['reason']}") for op, how in found["kernels"].items()]
    return lines


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**30:.1f} GiB"
