"""A real PostgreSQL server on loopback, in a temporary folder, not run by root."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

# Debian keeps the programs of the server outside the PATH.
SEARCH = os.pathsep.join(
    [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin")))]
)
PROGRAMS = ("initdb", "postgres")


def missing_programs():
    """Names of the programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


@contextlib.contextmanager
def postgres_server():
    """Start a server; yield the URL of its database. It is stopped at the end, by its pid."""
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    own = {}
    if os.getuid() == 0:  # it refuses to run as root
        name = next(each for each in ("postgres", "nobody") if _exists(each))
        own = {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []}
        shutil.chown(folder, name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    programs = {name: shutil.which(name, path=SEARCH) for name in PROGRAMS}
    data = folder / "data"
    run = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **own}
    command = [programs["initdb"], "-D", data, "-U", "tests", "-A", "trust", "--no-sync"]
    subprocess.run(command, check=True, **run)
    command = [programs["postgres"], "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", folder]
    server = subprocess.Popen(command, **run)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield f"postgresql+psycopg://tests@127.0.0.1:{port}/postgres"
    finally:
        # Its fast shutdown: it would wait for open connections at SIGTERM.
        server.send_signal(signal.SIGINT)
        server.wait()
        shutil.rmtree(folder)


def _exists(name):
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwnam(name))
    return False
