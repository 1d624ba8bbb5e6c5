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


@contextlib.contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Lock an output folder for this process. The operating system releases it if the process dies.

    On a file system without locks this only warns.
    Raises: UserError that names the run that holds it; nothing in the folder is changed then.
    """
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
        lock.truncate(0)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        # The first byte is a space: others may not be able to read it.
        lock.write(b" " + json.dumps(facts).encode())
        try:
            yield
        finally:
            remove_open_file(folder / LOCK_FILE, lock)


def refuse_in_use(folder: Path) -> None:
    """Raises: UserError that names the run that holds a folder at this moment."""
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
            # The run that held it may have removed the file since it was opened here.
            if (
                lock is not None
                and path.exists()
                and os.path.samestat(os.fstat(lock.fileno()), path.stat())
            ):
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
