"""Evaluation: tasks made from a seed, figures of a policy on them, comparisons and studies.

Importing this package loads neither transformers nor what the figures need; names come when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvframe.eval.running import run_study
    from kvframe.eval.study import Study
    from kvframe.eval.tasks import TASKS, Sample, Task, Turn, task
    from kvframe.eval.text import Haystack, haystack

__all__ = ["TASKS", "Haystack", "Sample", "Study", "Task", "Turn", "haystack", "run_study", "task"]

# Names and the modules they come from.
_LAZY = {
    "Haystack": "kvframe.eval.text",
    "haystack": "kvframe.eval.text",
    "TASKS": "kvframe.eval.tasks",
    "Sample": "kvframe.eval.tasks",
    "Study": "kvframe.eval.study",
    "Task": "kvframe.eval.tasks",
    "Turn": "kvframe.eval.tasks",
    "run_study": "kvframe.eval.running",
    "task": "kvframe.eval.tasks",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvframe.eval' has no attribute {name!r}")
