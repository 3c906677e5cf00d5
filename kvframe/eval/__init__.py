"""Tasks, metrics and studies: which policy, at which budget, on which model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvframe.eval.running import run_study
    from kvframe.eval.study import Study

__all__ = ["Study", "run_study"]

# Loaded when one of them is first asked for.
_LAZY = {
    "Study": "kvframe.eval.study",
    "run_study": "kvframe.eval.running",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvframe.eval' has no attribute {name!r}")
