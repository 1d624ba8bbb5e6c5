"""A lock that allows one run per folder."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import psutil

from hf_cifar.errors import UserError
from hf_cifar.platform import lock_file, remove_open_file
from hf_cifar.runs.processes import launcher_restarts

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# Seconds to wait for the lock of a dead process: network storage takes up to 90 to notice that a machine is
# lost.
PATIENCE = 120


_held: set[Path] = set()  # folders that a series has locked in this process


@contextlib.contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Lock an output folder for this process. The operating system releases it if the process dies.

    On a file system without locks this only warns.
    Raises: UserError that names the run that holds it; nothing in the folder is changed then.
    """
    if folder.resolve() in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(_locked(folder, create=True))
        except NotImplementedError as error:
            logger.warning(
                "cannot lock %s (%s); do not start another run in it until this one ends",
                folder,
                error,
            )
            yield
            return
        with _signed(folder, lock):
            yield


@contextlib.contextmanager
def claimed_run(folder: Path) -> Iterator[bool]:
    """Lock an output folder for a run that this process may start in the block; yields False, at once, if
    another process holds it.

    Without locks it yields True: only one process can work on a series then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        path = folder / LOCK_FILE
        try:
            lock = stack.enter_context(lock_file(path, create=True))
        except NotImplementedError:
            yield True
            return
        if lock is None or not _is_file_at(path, lock):
            yield False
            return
        stack.enter_context(_signed(folder, lock))
        _held.add(folder.resolve())
        try:
            yield True
        finally:
            _held.remove(folder.resolve())


@contextlib.contextmanager
def _signed(folder: Path, lock: IO[bytes]) -> Iterator[None]:
    """Write who holds a lock into its file, and remove the file when the block ends."""
    lock.truncate(0)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    # The first byte is a space: others may not be able to read it.
    lock.write(b" " + json.dumps(facts).encode())
    try:
        yield
    finally:
        remove_open_file(folder / LOCK_FILE, lock)


def _is_file_at(path: Path, file: IO[bytes]) -> bool:
    """Return False if the run that held a lock has removed its file since it was opened here."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def refuse_in_use(folder: Path) -> None:
    """Raises: UserError that names the run that holds a folder at this moment."""
    if folder.resolve() in _held:
        return
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError, NotImplementedError),
        _locked(folder, create=False),
    ):
        pass


@contextlib.contextmanager
def _locked(folder: Path, *, create: bool) -> Iterator[IO[bytes]]:
    """Lock a folder's lock file until the block ends. Raises: UserError if another run holds it."""
    path = folder / LOCK_FILE
    for waited in itertools.count():
        with lock_file(path, create=create) as lock:
            if lock is not None and _is_file_at(path, lock):
                yield lock
                return
            holder = _holder(path)
            if waited >= PATIENCE or not (launcher_restarts() or _is_dead(holder)):
                shown = (
                    "process {pid} on {host} since {started}".format(**holder)
                    if holder
                    else "another run"
                )
                raise UserError(
                    f"{folder} is in use by {shown}; wait for it, or pass another --output_dir"
                )
        if not waited:
            logger.warning(
                "%s is locked by another run; waiting up to two minutes for the lock", folder
            )
        time.sleep(1)


def _holder(path: Path) -> dict[str, Any]:
    """Return pid, host and start of the process that wrote a lock file; {} if they cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(1)
            facts = json.loads(file.read())
        return {name: facts[name] for name in ("pid", "host", "started")}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Return True if the process that wrote a lock file ran on this machine, and has ended.

    Its loader processes keep the lock for some seconds until they notice.
    """
    return holder.get("host") == socket.gethostname() and not psutil.pid_exists(holder["pid"])
