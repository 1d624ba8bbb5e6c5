"""Signals that stop a run in good order."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import signal
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# glibc's, from malloc.h: the size from which free memory goes back to the system, the most mapped blocks, and
# the most arenas.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop; it ends with exit status 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Signals that are noted while something must not be cut off: a step, a save, the end of a run.

    number: of the first signal that came, 0 for none. A second one stops at once.
    """

    def __init__(self) -> None:
        self.number = 0

    def note(self, number: int, frame: object = None) -> None:
        if self.number:
            raise Stopped(number)
        self.number = number

    def obey(self) -> None:
        """Raises: Stopped, if a signal came."""
        if self.number:
            raise Stopped(self.number)


@contextlib.contextmanager
def noted_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of obeying them; whoever asks for this obeys where it can."""
    request = StopRequest()
    with handled_signals(request.note, *STOP_SIGNALS):
        yield request


@contextlib.contextmanager
def handled_signals(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """Let a handler have signals until the block ends. They are the main thread's: elsewhere, nothing."""
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def stop_at_once(number: int, frame: object = None) -> None:
    """A signal handler for everywhere else. Raises: Stopped."""
    raise Stopped(number)


@functools.cache
def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for what this process needs next; for training on a CPU.

    glibc maps each large block anew and unmaps it when it is freed. But a training step frees what the next
    asks for again, and the system clears every page in between; docs/speed.md has what that costs. Nothing
    happens with another C library.

    Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_ARENA_MAX, 1)  # those of further threads are given back all the same
