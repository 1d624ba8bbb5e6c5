"""One run a folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from hf_cifar.errors import UserError

LOCK_FILE = ".lock"


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
