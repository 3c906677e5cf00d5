"""Every family in a process of its own, so that no crash, leak or endless loop of one reaches another."""

import contextlib
import logging
import multiprocessing
import os
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess

import torch
from attrs import frozen

from kvframe.hf.families.compare import compare
from kvframe.hf.families.outcome import Outcome, Status


def outcomes(types: Sequence[str], jobs: int = 1, timeout: float = 120.0) -> Iterator[Outcome]:
    """Compare `types`, `jobs` at a time, and give each outcome as it comes."""
    # a fork server has torch and transformers loaded once, and forks from there: seconds saved per family
    context: ForkServerContext | SpawnContext
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    else:
        context = multiprocessing.get_context("spawn")
    waiting = deque(types)
    running: dict[Connection, _Child] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                receiver, sender = context.Pipe(duplex=False)
                model_type = waiting.popleft()
                process = context.Process(target=_compare_and_send, args=(model_type, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = _Child(model_type, process, time.monotonic() + timeout)
            next_deadline = min(child.deadline for child in running.values())
            ready = set(wait(list(running), max(0.0, next_deadline - time.monotonic())))
            for receiver, child in list(running.items()):
                if receiver in ready:
                    yield _receive(receiver, child)
                elif time.monotonic() >= child.deadline:
                    reason = f"no answer within {timeout:g} s"
                    yield Outcome(model_type=child.model_type, status=Status.ERROR, reason=reason)
                else:
                    continue
                del running[receiver]
                _end(receiver, child)
    finally:
        for receiver, child in running.items():
            _end(receiver, child)


@frozen
class _Child:
    model_type: str
    process: BaseProcess
    deadline: float


def _compare_and_send(model_type: str, sender: Connection) -> None:
    # one thread each, and nothing of what transformers has to say about tiny models on the caller's terminal
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        outcome = compare(model_type)
    sender.send(outcome)


def _receive(receiver: Connection, child: _Child) -> Outcome:
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        child.process.join()
        reason = f"its process died with exit code {child.process.exitcode}"
        return Outcome(model_type=child.model_type, status=Status.ERROR, reason=reason)
    return outcome


def _end(receiver: Connection, child: _Child) -> None:
    child.process.kill()
    child.process.join()
    child.process.close()
    receiver.close()
