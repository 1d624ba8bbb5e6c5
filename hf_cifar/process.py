"""A run's process: alone in its output folder, stopped by a signal in good order, its memory kept."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from hf_cifar.errors import UserError

LOCK_FILE = ".lock"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# glibc's, from malloc.h: the size from which free memory goes back to the system, the most mapped blocks, and
# the most arenas.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop; it ends with exit status 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Hold an output folder for this process. The system lets go of it if the process dies.

    Raises: UserError that names the run that holds it; nothing in the folder is changed then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    with path.open("a+") as lock:
        _take(lock, folder)
        lock.truncate(0)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": started}, lock)
        lock.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def refuse_in_use(folder: Path) -> None:
    """Raises: UserError that names the run that holds a folder at this moment."""
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
        (folder / LOCK_FILE).open() as lock,
    ):
        _take(lock, folder)


def _take(lock: IO[str], folder: Path) -> None:
    """Lock an open lock file until it is closed."""
    path = folder / LOCK_FILE
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The run that held it may have removed the file since it was opened here.
        free = path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except BlockingIOError:
        free = False
    if not free:
        raise UserError(
            f"{folder} is in use by {_holder(path)}; wait for it, or pass another --output_dir"
        )


def _holder(path: Path) -> str:
    try:
        facts = json.loads(path.read_text())
        return f"process {facts['pid']} on {facts['host']} since {facts['started']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another run"


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
