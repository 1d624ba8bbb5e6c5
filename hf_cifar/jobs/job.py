"""A job: the command that another machine runs, and everything that is sent with it."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from hf_cifar.config.run import RunConfig
from hf_cifar.errors import UserError
from hf_cifar.text import megabytes


@dataclass(frozen=True)
class Job:
    """What is sent to another machine, in full.

    name: in lists of jobs. facts: of the machine, by name, for display. command: what is executed.
    environment: variables besides those that the machine has. secrets: names of variables whose values are
    never shown. files: by their path there, a text or a file of this machine.
    """

    name: str
    facts: dict[str, str]
    command: list[str]
    environment: dict[str, str]
    secrets: tuple[str, ...]
    files: dict[str, str | Path]

    @property
    def num_bytes(self) -> int:
        """Return the size of all files."""
        return sum(size_of(file) for file in self.files.values())

    def render(self) -> str:
        """Show what is sent: values of secrets are not part of a job, texts are shown in full."""
        rows = {
            "job": self.name,
            **self.facts,
            "command": shlex.join(self.command),
            "environment": " ".join(f"{k}={v}" for k, v in self.environment.items())
            or "none added",
            "secrets": ", ".join(f"{name}, not shown" for name in self.secrets) or "none",
            "files": f"{len(self.files)}, {megabytes(self.num_bytes)}",
        }
        lines = [f"{name:<12}{value}" for name, value in rows.items()]
        lines += [f"  {megabytes(size_of(file)):>12}  {name}" for name, file in self.files.items()]
        for name, file in self.files.items():
            if isinstance(file, str):
                lines += ["", f"{name}:", *(f"  {line}".rstrip() for line in file.splitlines())]
        return "\n".join(lines)


def job_name(name: str) -> str:
    """Return the name of a job for what it makes, in characters that every system takes."""
    return f"hf-cifar-{re.sub(r'[^0-9A-Za-z_-]', '-', name)}"


def size_of(file: str | Path) -> int:
    """Return the bytes of a text or a file."""
    return len(file.encode()) if isinstance(file, str) else file.stat().st_size


def check_job(config: RunConfig) -> None:
    """Raises: UserError for a command that cannot be submitted, wherever it goes."""
    if "RANK" in os.environ or "LOCAL_RANK" in os.environ:
        raise UserError(
            "--job cannot be used under a launcher; run hf-cifar finetune directly (the job starts one "
            "process per GPU)"
        )
    if config.train.hub_token is not None:
        raise UserError(
            "--hub_token would be readable in the job; leave it out, and run: hf auth login, or set HF_TOKEN"
        )
