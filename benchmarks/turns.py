"""Processes that work in turns of a few seconds, so that a noisy machine is as noisy for all of them.

While one works, the others stand still, loader processes included.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch

Turn = Callable[[], None]  # to be called after each step
# Forked from a process that has imported everything and computed nothing. Not where there is a GPU: imports
# alone touch it, and a forked process could not use it then.
CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")


class Worker:
    """A process that is stopped except during its turns, which end with the first step after `seconds`.

    work: can be pickled. peak_mb: the most memory that it has taken so far; the GPU's where there is one.
    """

    def __init__(self, work: Callable[[Turn], None], warm_up: int, seconds: float) -> None:
        self._connection, other = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_work, args=(work, warm_up, seconds, other))
        self._process.start()
        other.close()
        self.peak_mb = 0.0

    def warm_up(self) -> None:
        """Wait until it has warmed up, and stop it. Raises: SystemExit if it ends instead."""
        self._until_it_reports()

    def turn(self) -> float:
        """Take one turn; return steps a second. Raises: SystemExit if the process ends instead."""
        self._signal(signal.SIGCONT)
        self._connection.send(None)
        return self._until_it_reports()

    def end(self) -> None:
        """Kill it with its loader processes."""
        with contextlib.suppress(ProcessLookupError):
            self._signal(signal.SIGKILL)
        self._process.join()

    def _until_it_reports(self) -> float:
        try:
            speed, self.peak_mb = self._connection.recv()
        except EOFError:
            raise SystemExit(f"process {self._process.pid} ended before its turns did") from None
        self._signal(signal.SIGSTOP)
        return speed

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


@contextlib.contextmanager
def workers(
    works: dict[str, Callable[[Turn], None]], warm_up: int, seconds: float
) -> Iterator[dict[str, Worker]]:
    """One stopped process for each, warmed up; they start and warm up at the same time."""
    started: dict[str, Worker] = {}
    try:
        for name, work in works.items():
            started[name] = Worker(work, warm_up, seconds)
        for worker in started.values():
            worker.warm_up()
        yield started
    finally:
        for worker in started.values():
            worker.end()


def _work(
    work: Callable[[Turn], None], warm_up: int, seconds: float, connection: Connection
) -> None:
    """In the process: work, and wait at the end of the warm-up and of each turn."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for loader processes, as outside
    count, start, least = 0, time.perf_counter(), None

    def step_done() -> None:
        nonlocal count, start, least
        count += 1
        if count < warm_up if least is None else time.perf_counter() - start < least:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        connection.send((count / (time.perf_counter() - start), _peak_mb()))
        connection.recv()
        count, start, least = 0, time.perf_counter(), seconds

    work(step_done)


def _peak_mb() -> float:
    """The most memory that this process has taken, in MB: allocated on the GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
