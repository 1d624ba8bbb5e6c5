"""Processes that work in turns of a few seconds, so that noise of the machine affects all of them equally.

While one works, the others are stopped, loader processes included.
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
# Forked from a process that has imported everything and computed nothing. With a GPU they are spawned:
# imports alone initialise it, and a forked process could not use it then.
CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")


class Worker:
    """A process that is stopped except during its turns, which end with the first step after `seconds`.

    work: a function that can be pickled. peak_mb: peak memory so far, of the GPU if there is one.
    """

    def __init__(self, work: Callable[[Turn], None], warm_up: int, seconds: float) -> None:
        self._connection, other = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_work, args=(work, warm_up, seconds, other))
        self._process.start()
        other.close()
        self.peak_mb = 0.0

    def warm_up(self) -> None:
        """Wait until the process has warmed up, and stop it. Raises: SystemExit if it ends instead."""
        self._until_it_reports()

    def turn(self) -> float:
        """Run one turn; returns steps per second. Raises: SystemExit if the process ends instead."""
        self._signal(signal.SIGCONT)
        self._connection.send(None)
        return self._until_it_reports()

    def end(self) -> None:
        """Kill the process and its loader processes."""
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
    """Start a process for each work; all warm up at the same time, and are stopped then."""
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
    """Work in the child process, and wait after the warm-up and after each turn."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for loader processes, as in the parent
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
    """Return the peak memory of this process in MB: allocated on the GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
