"""A machine of the local HF Jobs: mounts what was staged, and runs the posted command on it.

Its `uv` installs the staged package by the real uv, without dependencies, which are those of the tests.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

from hub_server import Hub, RemoteJob, hub_environment

UV = """#!{python}
import os, subprocess, sys
run, no_project, with_, requirement, python, *command = sys.argv[1:]
assert (run, no_project, with_, python) == ("run", "--no-project", "--with", "python"), sys.argv
subprocess.run(
    [{uv!r}, "pip", "install", "--quiet", "--offline", "--no-cache", "--no-deps", "--python", sys.executable,
     "--target", {site!r}, requirement],
    check=True,
)
os.execve(sys.executable, [sys.executable, *command], {{**os.environ, "PYTHONPATH": {site!r}}})
"""


class Machine:
    """Runs jobs below a folder. done: set when one has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done = threading.Event()

    def __call__(self, job: RemoteJob, hub: Hub) -> None:
        try:
            status = self.run(job, hub)
            job.stage = "COMPLETED" if status == 0 else "ERROR"
            job.message = None if status == 0 else f"exit status {status}"
        except Exception as error:
            job.lines.append(f"{type(error).__name__}: {error}")
            job.stage = "ERROR"
        finally:
            self.done.set()

    def run(self, job: RemoteJob, hub: Hub) -> int:
        (volume,) = job.spec["volumes"]
        repo = hub.repos["datasets", volume["source"]]
        assert volume["revision"] == repo.sha
        inputs, binaries, work = (self.folder / name for name in ("inputs", "bin", "work"))
        for folder in (inputs, binaries, work):
            folder.mkdir(parents=True)
        prefix = f"{volume['path']}/"
        for path, content in repo.files.items():
            if path.startswith(prefix):
                target = inputs / path.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.suffix == ".yaml":  # tests cannot mount at the root
                    content = content.replace(volume["mountPath"].encode(), str(inputs).encode())
                target.write_bytes(content)
        uv = Path(sys.executable).with_name("uv")
        (binaries / "uv").write_text(
            UV.format(python=sys.executable, uv=str(uv), site=str(self.folder / "site"))
        )
        (binaries / "uv").chmod(0o755)
        environment = hub_environment(self.folder / "home", hub.endpoint)
        environment |= {"PATH": f"{binaries}{os.pathsep}{environment['PATH']}"}
        environment |= {"HF_CIFAR_CACHE": str(self.folder / "cache")}
        for name in ("HF_TOKEN", "PYTHONPATH"):
            environment.pop(name, None)
        environment |= job.spec["environment"] | job.spec["secrets"]
        command = [part.replace(volume["mountPath"], str(inputs)) for part in job.spec["command"]]
        process = subprocess.Popen(
            command, env=environment, cwd=work, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        job.lines.append(f"===== Job started: {shlex.join(command)} =====")
        assert process.stdout is not None
        for line in process.stdout:
            job.lines.append(line.rstrip("\n"))
        return process.wait()
