"""What makes two cells the same: hashes of configs, code, models and files, none of which depends on a path."""

import functools
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.stages import SLOTS

_EDGE = 1 << 16
"""Bytes at either end of a file of weights that tell it from others."""
_SOURCES = (".py", ".cu", ".cuh", ".cpp")
# What is above the figures: how they are shown, kept and shared out does not change them.
_ABOVE = ("cli", "bench", "eval/report", "eval/engine")
_KERNELS = "kvframe_kernels"


def cell_key(config: Mapping[str, Any]) -> str:
    """A hash of plain data: the same for equal data, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes. Raises ConfigError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def model_identity(model: str) -> dict[str, Any]:
    """What tells a model from others: its config and its weights; of a name on the hub, the name.

    Weights are gigabytes, so of each file its size and both ends count. Raises ConfigError for a directory without
    config.json.
    """
    from kvframe.models import SMOLLM2, find_smollm2

    folder = Path(model).expanduser()
    fetched = find_smollm2() if model == SMOLLM2 else None
    if fetched is not None:
        folder = fetched
    if not folder.is_dir():
        return {"name": model}
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{model} is a directory without config.json; expected one that from_pretrained reads")
    weights = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf"))
    return {
        "config": file_digest(folder / "config.json"),
        "weights": [[path.name, path.stat().st_size, _ends(path)] for path in weights],
    }


def _ends(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(_EDGE)
        file.seek(max(0, path.stat().st_size - _EDGE))
        return hashlib.sha256(start + file.read(_EDGE)).hexdigest()


def code_version(policy: Policy, task: Any) -> str:
    """kvframe's version, and a hash of the source that a policy and a task run: kvframe, its kernels, and the packages
    that stages and task come from.

    A class outside of any package, such as one defined in the study file, counts with its own source alone.
    """
    parts = [part for slot in SLOTS for part in policy.stage(slot).with_parts()]
    digests = {_digest_of(type(part)) for part in (*parts, task)}
    from kvframe import __version__

    text = "".join(sorted({_package_digest("kvframe"), _package_digest(_KERNELS), *digests}))
    return f"{__version__}+{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _digest_of(kind: type) -> str:
    package = kind.__module__.partition(".")[0]
    if _is_package(package):
        return _package_digest(package)
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    except (OSError, TypeError):
        # Typed at a prompt: its name has to do.
        return f"{kind.__module__}.{kind.__qualname__}"


def _is_package(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # a module made by hand has no spec
        return False
    return spec is not None and bool(spec.submodule_search_locations)


@functools.cache
def _package_digest(package: str) -> str:
    """A hash of every source file of a package that figures can depend on."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    digest = hashlib.sha256()
    for root in spec.submodule_search_locations:
        for path in sorted(Path(root).rglob("*")):
            name = path.relative_to(root).as_posix()
            above = package == "kvframe" and name.startswith(_ABOVE)
            if path.suffix in _SOURCES and not above and path.is_file():
                digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
