"""A real Slurm of one node on loopback, in a temporary folder, run by the current user."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# Debian keeps daemons outside the PATH of ordinary users.
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
MinJobAge=3600
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=1 State=UNKNOWN
PartitionName=main Nodes=node Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs():
    """Names of the programs of Slurm and munge that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def slurm_cluster():
    """Start the three daemons; yield the environment in which sbatch and the like find them. They are killed
    at the end, by their pids."""
    # A socket's path is limited to about 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    conf = CONF.format(
        folder=folder, host=socket.gethostname().split(".")[0], user=getpass.getuser(), ports=free_ports(2)
    )  # fmt: skip
    (folder / "slurm.conf").write_text(conf)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH}
    version = subprocess.run(
        ["sbatch", "--version"], env=environment, capture_output=True, text=True
    )
    if int(re.search(r"(\d+)\.", version.stdout)[1]) >= 23:
        (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    files = {"key": "munge.key", "pid": "munge.pid", "log": "munge.log", "seed": "munge.seed"}
    munged = ["munged", "--foreground", "--force", "--socket", f"{folder}/munge.socket"]
    munged += [
        word for kind, name in files.items() for word in (f"--{kind}-file", f"{folder}/{name}")
    ]
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "node"]):
            log = (folder / f"{command[0]}.out").open("w")
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command[0] == "munged":
                wait_until((folder / "munge.socket").exists, 10)
        wait_until(lambda: "idle" in output(["sinfo", "-h", "-o", "%T"], environment), 30)
        yield environment
        output(["scancel", "--user", getpass.getuser()], environment)
        wait_until(
            lambda: not output(["squeue", "-h", "--states", "RUNNING,COMPLETING"], environment), 30
        )
    except TimeoutError:
        print(
            *(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log")), sep="\n"
        )
        raise
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def output(command, environment):
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def wait_until(condition, seconds):
    """Wait for a condition. Raises: TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.2)


def finished(number, environment, seconds=300):
    """Wait until a job has ended, and return the states of its tasks."""

    def states():
        found = output(["scontrol", "show", "job", number], environment)
        return re.findall(r"JobState=(\w+)", found)

    running = {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING"}
    wait_until(lambda: states() and not running & set(states()), seconds)
    return states()
