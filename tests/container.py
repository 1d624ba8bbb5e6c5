"""A server started as in its container, without a container engine: Linux namespaces, which need root.

It is process 1, with its own network; all file systems are read-only except /tmp, which is empty; its user
is that of the image, without capabilities, except to read every file: a test's Python may be in root's home.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODEL = "/mnt"  # /model in the image; this folder exists everywhere
LOOPBACK = (
    "import fcntl, socket, struct; "
    "fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh', b'lo', 1))"  # SIOCSIFFLAGS, IFF_UP
)
PREPARE = f"""
set -e
{sys.executable} -c "{LOOPBACK}"
mount --bind "$MODEL" {MODEL}
awk '{{print $5}}' /proc/self/mountinfo | sort -u | while read -r place; do
    case "$place" in /proc*|/dev*|/sys*) continue ;; esac
    # Refused while another program writes there.
    for attempt in 1 2 3 4 5 6 7 8 9; do
        if mount -o remount,ro,bind "$place" 2> /dev/null; then break; fi
        sleep 0.1
    done
done
mount -t tmpfs tmpfs /tmp
mount -t proc proc /proc
cd /tmp
exec setpriv --reuid "$ID" --regid "$ID" --clear-groups --no-new-privs \\
    --bounding-set=-all,+dac_read_search --inh-caps=-all,+dac_read_search --ambient-caps=+dac_read_search \\
    env -i "$@"
"""
NAMESPACES = ["unshare", "--pid", "--mount", "--net", "--fork", "--kill-child"]


def missing():
    """Return why no container can be emulated here, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "only root can make namespaces without an engine"
    if any(Path("/tmp") in Path(place).parents for place in (ROOT, sys.prefix)):
        return "this checkout is in /tmp, which a container hides"
    try:
        done = subprocess.run([*NAMESPACES, "setpriv", "true"], capture_output=True)
    except FileNotFoundError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.decode().strip()


class Container:
    """A running program. process: its parent outside; pid: its id outside. log: its output."""

    def __init__(self, log, model, user, environment, argv):
        self.log = Path(log)
        values = [f"{name}={value}" for name, value in environment.items()]
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [*NAMESPACES, "sh", "-c", PREPARE, "sh", *values, *argv],
                env={**os.environ, "MODEL": str(model), "ID": user}, stdout=output, stderr=output,
            )  # fmt: skip
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (found := children.read_text().split()):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)
        self.pid = int(found[0])

    def run(self, argv, **options):
        """Run a command in its namespaces."""
        enter = ["nsenter", "--target", str(self.pid), "--pid", "--mount", "--net"]
        return subprocess.run([*enter, *argv], capture_output=True, **options)

    def stop(self, number):
        """Send a signal, and return the exit status."""
        os.kill(self.pid, number)
        return self.process.wait(60)


@contextlib.contextmanager
def container(*arguments):
    """Start a program, and kill it at the end."""
    started = Container(*arguments)
    try:
        yield started
    finally:
        # Its first process, and so all of them; they have another user, and do not end with their parent.
        with contextlib.suppress(ProcessLookupError):
            os.kill(started.pid, signal.SIGKILL)
        started.process.wait()
