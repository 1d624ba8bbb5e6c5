"""What POSIX systems and Windows do differently. No other module calls what only one of them has."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# What a file system without locks answers.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
# Exit status of a command whose reader has gone, as a shell reports it. Windows has no such signal.
BROKEN_PIPE_STATUS = 128 + getattr(signal, "SIGPIPE", 13)


@contextlib.contextmanager
def lock_file(path: Path, *, create: bool) -> Iterator[IO[bytes] | None]:
    """Open and lock a file, which the system unlocks if the process dies; None if another holds the lock.

    Windows lets no other process read the first byte of a locked file; the others can be read.
    Raises: NotImplementedError if its file system has no locks; OSError if it cannot be opened.
    """
    from filelock import lock_descriptor

    # For writing if possible: NFS locks nothing else.
    mode = "ab" if create else "rb+" if os.access(path, os.W_OK) else "rb"
    with path.open(mode, buffering=0) as file:
        try:
            locked = lock_descriptor(file.fileno(), blocking=False)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise NotImplementedError(f"no locks there: {error.strerror}") from None
        yield file if locked else None


def remove_open_file(path: Path, file: IO[bytes]) -> None:
    """Close a file and remove it. Removed first where that is possible: a name that others may open already
    is not removed then."""
    try:
        path.unlink(missing_ok=True)
        file.close()
    except PermissionError:  # Windows removes no open file
        file.close()
        with contextlib.suppress(OSError):  # nor one that another process has opened by now
            path.unlink()


def flush_to_disk(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk. Windows flushes no folder."""
    is_folder = path.is_dir()
    if is_folder and not hasattr(os, "O_DIRECTORY"):
        return
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_malloc_option(parameter: int, value: int) -> None:
    """Set an option of glibc's malloc, see mallopt(3). With another C library this does nothing."""
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    except TypeError:  # on Windows, a process has no library of itself
        return
    if mallopt is not None:
        mallopt(parameter, value)


def is_broken_pipe(error: OSError) -> bool:
    """Return True if a write failed because its reader has gone."""
    return isinstance(error, BrokenPipeError) or (
        not hasattr(signal, "SIGPIPE") and error.errno == errno.EINVAL
    )
