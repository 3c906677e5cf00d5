"""Where a benchmark runs: the device, and the versions that matter."""

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from kvframe.errors import ConfigError

_PACKAGES = ("kvframe", "torch", "triton", "transformers")


def require_cuda(command: str) -> torch.device:
    """The CUDA device in use; raises ConfigError where there is none."""
    if not torch.cuda.is_available():
        raise ConfigError(f"`kvframe bench {command}` needs a CUDA device, and torch {torch.__version__} finds none")
    return torch.device("cuda", torch.cuda.current_device())


def choose_device(command: str, name: str, shape: str) -> torch.device:
    """The device of that name, "cuda" or "cpu"; on a CPU only the shape "tiny" makes sense.

    Raises ConfigError for anything else.
    """
    if name == "cpu":
        if shape != "tiny":
            raise ConfigError(
                f"`kvframe bench {command}` needs a CUDA device for --model-shape {shape}; --device cpu takes "
                "--model-shape tiny, to try the command out"
            )
        return torch.device("cpu")
    if name != "cuda":
        raise ConfigError(f"--device must be cuda or cpu; got {name!r}")
    return require_cuda(command)


def describe(device: torch.device) -> dict[str, Any]:
    """Device and versions, as plain data."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
