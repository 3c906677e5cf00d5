"""A Ray cluster: Ray Core tasks, run again on another node where theirs is lost."""

import importlib.util
import os
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any

from kvframe.errors import ConfigError
from kvframe.eval.engine.base import Engine, Started
from kvframe.eval.outcome import Outcome
from kvframe.eval.study import Cell
from kvframe.eval.studyfile import StudyFile

_RETRIES = 8
"""Times that a cell is started anew because its node was lost."""


class RayEngine(Engine):
    """One Ray task for every cell, with one core and, where the cluster has GPUs, one GPU.

    Uses the cluster that this process is connected to, the one at RAY_ADDRESS, or one that is started on this machine.
    kvframe, the policies' packages and the model have to be on every node; the study file goes there by itself.
    """

    def __init__(self, workers: int | None = None, study_file: StudyFile | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("--engine ray needs Ray; pip install 'kvframe[ray]'")
        if workers is not None and workers < 1:
            raise ConfigError(f"a study needs at least one worker, got {workers}")
        self._limit = workers
        self._study_file = study_file

    @property
    def workers(self) -> int:
        import ray

        if not ray.is_initialized():
            return self._limit or len(os.sched_getaffinity(0))
        resources: dict[str, float] = ray.cluster_resources()
        slots = resources.get("GPU") or resources.get("CPU", 1)
        return min(self._limit or int(slots), max(1, int(slots)))

    def run(self, cells: Sequence[Cell], started: Started) -> Iterator[tuple[Cell, Outcome]]:
        import ray

        is_ours = not ray.is_initialized()
        if is_ours:
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False)
        waiting = deque(cells)
        running: dict[Any, tuple[Cell, float]] = {}
        try:
            task = self._task()
            while waiting or running:
                while waiting and len(running) < self.workers:
                    cell = waiting.popleft()
                    running[task.remote(self._study_file, pickle.dumps(cell), cell.key)] = (cell, perf_counter())
                    started(cell)
                done, _ = ray.wait(list(running), num_returns=1)
                for reference in done:
                    cell, since = running.pop(reference)
                    try:
                        outcome = ray.get(reference)
                    except ray.exceptions.RayError as error:
                        # Its node was lost too often, or its worker dies of it.
                        outcome = Outcome(key=cell.key, error=str(error), seconds=perf_counter() - since)
                    yield cell, outcome
        finally:
            for reference in running:
                ray.cancel(reference, force=True)
            if is_ours:
                ray.shutdown()

    def _task(self) -> Any:
        import ray

        from kvframe.eval.engine.local import work

        has_gpus = ray.cluster_resources().get("GPU", 0) > 0
        return ray.remote(
            num_cpus=1, num_gpus=1 if has_gpus else 0, max_retries=_RETRIES, scheduling_strategy="SPREAD"
        )(work)
