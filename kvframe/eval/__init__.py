"""Evaluation: tasks made from a seed, figures of a policy on them, comparisons and studies.

Importing this package loads neither transformers nor what the figures need; names come when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvframe.eval.footprint import critical_footprint
    from kvframe.eval.forced import context_limit, full_logits, run_forced
    from kvframe.eval.metrics import DEFAULT_METRICS, METRICS, check_metrics
    from kvframe.eval.replaying import replay
    from kvframe.eval.runner import evaluate
    from kvframe.eval.running import run_study
    from kvframe.eval.statistics import mean_interval
    from kvframe.eval.study import Study
    from kvframe.eval.tasks import TASKS, Sample, Task, Turn, task
    from kvframe.eval.text import Haystack, haystack
    from kvframe.eval.trace import load_trace, record, save_trace

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "TASKS",
    "Haystack",
    "Sample",
    "Study",
    "Task",
    "Turn",
    "check_metrics",
    "context_limit",
    "critical_footprint",
    "evaluate",
    "full_logits",
    "haystack",
    "load_trace",
    "mean_interval",
    "record",
    "replay",
    "run_forced",
    "run_study",
    "save_trace",
    "task",
]

# Names and the modules they come from.
_LAZY = {
    "DEFAULT_METRICS": "kvframe.eval.metrics",
    "METRICS": "kvframe.eval.metrics",
    "TASKS": "kvframe.eval.tasks",
    "Haystack": "kvframe.eval.text",
    "Sample": "kvframe.eval.tasks",
    "Study": "kvframe.eval.study",
    "Task": "kvframe.eval.tasks",
    "Turn": "kvframe.eval.tasks",
    "check_metrics": "kvframe.eval.metrics",
    "context_limit": "kvframe.eval.forced",
    "critical_footprint": "kvframe.eval.footprint",
    "evaluate": "kvframe.eval.runner",
    "full_logits": "kvframe.eval.forced",
    "haystack": "kvframe.eval.text",
    "load_trace": "kvframe.eval.trace",
    "mean_interval": "kvframe.eval.statistics",
    "record": "kvframe.eval.trace",
    "replay": "kvframe.eval.replaying",
    "run_forced": "kvframe.eval.forced",
    "run_study": "kvframe.eval.running",
    "save_trace": "kvframe.eval.trace",
    "task": "kvframe.eval.tasks",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvframe.eval' has no attribute {name!r}")
