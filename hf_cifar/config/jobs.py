"""Options that run the command on another machine. They are not part of the run: no config.yaml has them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any, Literal

from hf_cifar.config.fields import check_fields, option
from hf_cifar.errors import UserError

TIME = re.compile(r"\d+(\.\d+)?[smhd]")
# Set in the script that is submitted.
OWN_SBATCH_OPTIONS = ("array", "output", "parsable", "wrap")
# Options of one kind of job.
FOR_HF_JOBS = ("flavor", "job_timeout")
FOR_SLURM = ("slurm_options",)


def _option(default: Any, text: str) -> Any:
    return option(default, text, may_change=True, saved=False, public=False)


@dataclass(frozen=True)
class JobConfig:
    """Where the command runs instead of here."""

    _argument_group_name = "job"

    job: Literal["hf_jobs", "slurm"] | None = _option(
        None,
        "Run the command elsewhere: hf_jobs, on a machine of Hugging Face, with local data and models "
        "uploaded to a private repository and the result pushed to --hub_model_id; slurm, on the cluster "
        "that this machine belongs to, with --seeds as an array.",
    )
    flavor: str | None = _option(
        None,
        "Hardware of HF Jobs, for example a10g-small; hf jobs hardware lists the choices. Required with "
        "--job hf_jobs.",
    )
    job_timeout: str | None = _option(
        None, "Longest time of the job on HF Jobs, for example 90m or 2d; default: 6h."
    )
    slurm_options: list[str] | None = _option(  # noqa: RUF009
        None,
        "Options of sbatch without their dashes, for example partition=gpu gres=gpu:1 time=4:00:00.",
    )
    dry_run: bool = _option(False, "Show exactly what --job would send; send nothing.")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in (*FOR_HF_JOBS, *FOR_SLURM, "dry_run"):
            needed = "hf_jobs" if name in FOR_HF_JOBS else "slurm" if name in FOR_SLURM else None
            if not getattr(self, name) or (self.job is not None and needed in (None, self.job)):
                continue
            raise UserError(
                f"--{name} has no effect without --job{f' {needed}' if needed else ''}; leave it out"
            )
        if self.job == "hf_jobs" and not self.flavor:
            raise UserError(
                "--flavor is missing; pass the hardware of the job, for example a10g-small; hf jobs "
                "hardware lists the choices"
            )
        if self.job_timeout is not None and not TIME.fullmatch(self.job_timeout):
            raise UserError(
                f"--job_timeout is {self.job_timeout!r}; pass a number followed by s, m, h or d, such as 90m"
            )
        for each in self.sbatch_options:
            if each.partition("=")[0] in OWN_SBATCH_OPTIONS:
                raise UserError(
                    f"--slurm_options {each} would replace what the job sets itself; leave it out"
                )

    @property
    def sbatch_options(self) -> list[str]:
        """Return the options of sbatch, one an item, without dashes."""
        words = [word for each in self.slurm_options or () for word in shlex.split(each)]
        return [word.lstrip("-") for word in words]
