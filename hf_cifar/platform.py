"""Differences between POSIX systems and Windows. No other module makes calls that only one of them has."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

# Errors of a file system without locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)
# Exit status of a command whose reader closed the pipe, as a shell reports it. Windows has no such signal.
BROKEN_PIPE_STATUS = 128 + getattr(signal, "SIGPIPE", 13)

# Windows has no reads and writes at a position: seeking and reading must not be interrupted by another
# thread.
_seek_lock = threading.Lock()


@contextlib.contextmanager
def lock_file(path: Path, *, create: bool) -> Iterator[IO[bytes] | None]:
    """Open and lock a file; yields None if another process holds the lock. The system unlocks it if this
    process dies.

    On Windows, other processes cannot read the first byte of a locked file, only the rest.
    Raises: NotImplementedError if the file system has no locks; OSError if the file cannot be opened.
    """
    from filelock import lock_descriptor

    # For writing if possible, because NFS locks only such files.
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
    """Close and remove a file. If possible it is removed first, so that a file that another process has since
    locked under this name is kept."""
    try:
        path.unlink(missing_ok=True)
        file.close()
    except PermissionError:  # Windows does not remove an open file
        file.close()
        with contextlib.suppress(OSError):  # nor one that another process has opened
            path.unlink()


def flush_to_disk(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk. Does nothing for a folder on Windows."""
    is_folder = path.is_dir()
    if is_folder and not hasattr(os, "O_DIRECTORY"):
        return
    # Windows flushes only files that are open for writing.
    descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def num_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def allow_open_files() -> None:
    """Raise this process's limit of open files and connections to what the system allows; 1,024 is common.
    Does nothing on Windows, which has no such limit."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def on_hangup(loop: AbstractEventLoop, callback: Callable[[], object]) -> None:
    """Call a function in an event loop at each SIGHUP. Does nothing on Windows, which has no such signal."""
    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, callback)


def ignore_signals() -> None:
    """Ignore SIGTERM, and the signals that a terminal sends to all of its processes."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows lacks the last one
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Read bytes at a position of a file into a buffer; return their number, fewer at the end of the file."""
    if hasattr(os, "preadv"):
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
            if not count:
                break
            done += count
        return done
    with _seek_lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes at a position of a file. Raises: OSError."""
    if hasattr(os, "pwrite"):
        while data:
            count = os.pwrite(descriptor, data, offset)
            data, offset = data[count:], offset + count
        return
    with _seek_lock:
        os.lseek(descriptor, offset, os.SEEK_SET)
        while data:
            data = data[os.write(descriptor, data) :]


def set_malloc_option(parameter: int, value: int) -> None:
    """Set an option of glibc's malloc, see mallopt(3). Does nothing with another C library."""
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    except TypeError:  # on Windows, a process has no library of itself
        return
    if mallopt is not None:
        mallopt(parameter, value)


def is_broken_pipe(error: OSError) -> bool:
    """Return True if a write failed because its reader closed the pipe."""
    return isinstance(error, BrokenPipeError) or (
        not hasattr(signal, "SIGPIPE") and error.errno == errno.EINVAL
    )
