"""Processes of this machine: one for each GPU where there are several, on a CPU a few that share the cores."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from time import perf_counter

import torch

from kvframe.errors import ConfigError
from kvframe.eval.engine.base import Engine, Started
from kvframe.eval.outcome import Outcome
from kvframe.eval.study import Cell
from kvframe.eval.studyfile import StudyFile

_MOST_CPU_WORKERS = 4
"""Each holds the model once."""


class LocalEngine(Engine):
    """A pool of one process for every worker, so that a process that dies takes one cell with it, and it is known
    which.

    Workers have an equal share of the cores as threads. That share depends on `workers` alone and not on what is left
    to do: threads decide about rounding, and a study that goes on gives the figures that one without a break gives.
    """

    def __init__(self, workers: int | None = None, study_file: StudyFile | None = None) -> None:
        if workers is not None and workers < 1:
            raise ConfigError(f"a study needs at least one worker, got {workers}")
        self._devices = visible_devices()
        cores = available_cores()
        self._workers = workers or (len(self._devices) or min(cores, _MOST_CPU_WORKERS))
        self._threads = max(1, cores // self._workers)
        self._study_file = study_file

    @property
    def workers(self) -> int:
        return self._workers

    def run(self, cells: Sequence[Cell], started: Started) -> Iterator[tuple[Cell, Outcome]]:
        waiting = deque(cells)
        pools = [self._pool(number) for number in range(min(self._workers, len(cells)))]
        running: dict[Future[Outcome], tuple[int, Cell, float]] = {}
        idle = list(reversed(range(len(pools))))
        try:
            while waiting or running:
                while waiting and idle:
                    number, cell = idle.pop(), waiting.popleft()
                    future = pools[number].submit(work, self._study_file, pickle.dumps(cell), cell.key)
                    running[future] = (number, cell, perf_counter())
                    started(cell)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number, cell, since = running.pop(future)
                    try:
                        outcome = future.result()
                    except BrokenExecutor:
                        outcome = Outcome(key=cell.key, error=_DIED, seconds=perf_counter() - since)
                        pools[number].shutdown()
                        pools[number] = self._pool(number)
                    idle.append(number)
                    yield cell, outcome
        finally:
            for pool in pools:
                _end(pool)

    def _pool(self, number: int) -> ProcessPoolExecutor:
        # Forking a process that holds CUDA or threads of torch is not safe.
        device = self._devices[number % len(self._devices)] if self._devices else None
        return ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self._threads, device),
        )


_DIED = (
    "the worker process died while it ran this cell: it was killed, as the system does where memory runs out, or "
    "crashed in native code"
)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def visible_devices() -> list[str]:
    """CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    names = [name.strip() for name in named.split(",")] if named else [str(number) for number in range(count)]
    return names[:count]


def work(study_file: StudyFile | None, pickled: bytes, key: str) -> Outcome:
    """Run a cell in a worker. The cell comes pickled, because it may hold classes of the study file."""
    from kvframe.eval.worker import explain, run_cell

    since = perf_counter()
    try:
        if study_file is not None:
            study_file.load()
        cell: Cell = pickle.loads(pickled)
    except Exception as error:
        return Outcome(key=key, error=explain(error), seconds=perf_counter() - since)
    return run_cell(cell)


def _begin(threads: int, device: str | None) -> None:
    """Set a worker up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to answer
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # CUDA reads it when it is first used
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A driver that is killed cannot end its workers, so they watch it: none goes on working for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _end(pool: ProcessPoolExecutor) -> None:
    """End a pool and whatever it is running. `kill_workers` comes with Python 3.14; until then there is no public way
    to end a cell before its time."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()
    pool.shutdown(cancel_futures=True)
