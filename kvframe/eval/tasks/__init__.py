"""Tasks: those that are always there, made from a seed and a haystack, and one that reads a file of the user's."""

from typing import Any

from kvframe.errors import UnknownNameError
from kvframe.eval.tasks.base import Sample, Task, Turn
from kvframe.eval.tasks.copying import Copy
from kvframe.eval.tasks.countdown import Countdown
from kvframe.eval.tasks.dataset import Dataset
from kvframe.eval.tasks.kv_retrieval import KvRetrieval
from kvframe.eval.tasks.multi_turn import MultiTurn
from kvframe.eval.tasks.niah import NiahMultikey, NiahMultiquery, NiahMultivalue, NiahSingle
from kvframe.eval.tasks.passkey import Passkey
from kvframe.eval.tasks.path_traversal import PathTraversal
from kvframe.eval.tasks.perplexity import Perplexity
from kvframe.eval.tasks.relisting import Relisting
from kvframe.eval.tasks.variable_tracking import VariableTracking
from kvframe.eval.tasks.word_counts import CommonWords, FrequentWords
from kvframe.options import configure
from kvframe.suggest import hint

__all__ = ["TASKS", "Sample", "Task", "Turn", "task"]

TASKS: dict[str, type[Task]] = {
    made.name: made
    for made in (
        Passkey,
        NiahSingle,
        NiahMultikey,
        NiahMultivalue,
        NiahMultiquery,
        KvRetrieval,
        VariableTracking,
        CommonWords,
        FrequentWords,
        Copy,
        Perplexity,
        MultiTurn,
        Countdown,
        PathTraversal,
        Relisting,
        Dataset,
    )
}
"""Every task by its name."""


def task(name: str, /, **options: Any) -> Task:
    """A task by name, with its options.

    Raises UnknownNameError for a name that is none, ConfigError for an option or value that does not fit.
    """
    if name not in TASKS:
        raise UnknownNameError(f"there is no task {name!r}{hint(name, TASKS)}")
    return configure(TASKS[name], options)
