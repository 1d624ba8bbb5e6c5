"""Submit a fine-tuning to Slurm: a batch script that runs the same command, as an array of runs if there are
several."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_cifar.config.jobs import JobConfig
from hf_cifar.config.run import RunConfig
from hf_cifar.errors import UserError
from hf_cifar.jobs.job import Job, job_name
from hf_cifar.text import one_line

FOLDER = "slurm"  # in the output folder: scripts and logs
RESUME = ("--resume_from_checkpoint", "last")
SBATCH = re.compile(r"^sbatch: (error|fatal): ")
SCRIPT = """#!/bin/bash
{directives}
run=()
{tasks}# Slurm starts a job again after its node failed or it was preempted: the run resumes.
if [ -n "$SLURM_RESTART_COUNT" ]; then run+=({resume}); fi
launch=()
{launch}# In place of this shell, so that Slurm's signals reach the run.
exec {python} "${{launch[@]}}" -m hf_cifar {arguments} "${{run[@]}}"
"""


LAUNCH = """# One process for each GPU of the node.
if [ "${SLURM_GPUS_ON_NODE:-1}" -gt 1 ]; then
    launch=(-m torch.distributed.run --standalone --nproc_per_node "$SLURM_GPUS_ON_NODE")
fi
"""


def submit_slurm(
    config: RunConfig,
    argv: Sequence[str],
    runs: Sequence[RunConfig],
    collect: Sequence[str],
    options: JobConfig,
) -> int:
    """Submit the runs of a command, and print how to follow and cancel them; returns 0.

    argv: options of finetune, those of `config`. runs: those that the command consists of, such as the seeds
    of a series. Each becomes a task of an array, and a last job collects their results with `collect`, a
    command line that keeps finished runs.
    Raises: UserError if Slurm is missing or refuses the job; the files of the job are removed then.
    """
    folder = Path(config.train.output_dir).absolute() / FOLDER
    jobs = [batch_job(folder / "job.sh", ["finetune", *argv], tasks_of(config, runs), options)]
    if len(runs) > 1:
        last = batch_job(folder / "collect.sh", collect, [], options, launches=False)
        last.command[-1:-1] = ["--dependency=afterok:JOB", "--kill-on-invalid-dep=yes"]
        jobs.append(last)
    if options.dry_run:
        print("\n\n".join(job.render() for job in jobs))
        print("\nnothing was submitted: leave out --dry_run to submit")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError(
            "--job slurm needs sbatch, which is not on PATH; run the command on a login node of the cluster"
        )
    numbers: list[str] = []
    try:
        for job in jobs:
            numbers.append(_submit(job, numbers))
    except UserError:
        if numbers:
            subprocess.run(["scancel", *numbers], check=False)
        _remove(folder)
        raise
    log = folder / (f"{numbers[0]}_*.log" if len(runs) > 1 else f"{numbers[0]}.log")
    print(
        f"submitted job {numbers[0]}" + (f", an array of {len(runs)} runs" if len(runs) > 1 else "")
    )
    if len(runs) > 1:
        print(f"submitted job {numbers[1]}, which collects their results once all have succeeded")
    print(f"state: squeue --job {','.join(numbers)}")
    print(f"log: tail -F {log}")
    print(f"cancel: scancel {' '.join(numbers)}")
    return 0


def tasks_of(config: RunConfig, runs: Sequence[RunConfig]) -> list[list[str]]:
    """Return, for each run of a command, the arguments that make the command this run; none for one run."""
    if len(runs) < 2:
        return []
    return [
        [
            token
            for part in ("data", "augment", "model", "train")
            for name, value in vars(getattr(run, part)).items()
            if value != getattr(getattr(config, part), name)
            for token in (f"--{name}", str(value))
        ]
        for run in runs
    ]


def batch_job(
    path: Path,
    argv: Sequence[str],
    tasks: Sequence[Sequence[str]],
    options: JobConfig,
    *,
    launches: bool = True,
) -> Job:
    """Return the job of one batch script. path: of the script. argv: of hf-cifar. tasks: further arguments of
    each task of an array, none for a single job. launches: start a process for each GPU."""
    name = job_name(path.parents[1].name)
    output = path.parent / ("%A_%a.log" if tasks else "%j.log")
    directives = [
        f"job-name={name}",
        f"chdir={Path.cwd()}",
        f"output={str(output.parent).replace('%', '%%')}/{output.name}",
        *([f"array=0-{len(tasks) - 1}"] if tasks else []),
        *options.sbatch_options,
    ]
    cases = [f"    {number}) run=({shlex.join(task)}) ;;" for number, task in enumerate(tasks)]
    script = SCRIPT.format(
        directives="\n".join(f"#SBATCH {shlex.quote(f'--{each}')}" for each in directives),
        tasks="\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac\n"]) if tasks else "",
        resume=" ".join(RESUME),
        launch=LAUNCH if launches else "",
        python=shlex.quote(sys.executable),
        arguments=shlex.join(argv),
    )
    return Job(
        name=name,
        facts={"machine": "Slurm, " + (f"an array of {len(tasks)} runs" if tasks else "one job")},
        command=["sbatch", "--parsable", str(path)],
        environment={},
        secrets=(),
        files={str(path): script},
    )


def _submit(job: Job, before: Sequence[str]) -> str:
    """Write the script of a job, submit it, and return its number. before: numbers of earlier jobs.

    Raises: UserError if the folder cannot be written, or Slurm refuses the job.
    """
    for path, text in job.files.items():
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(path).write_text(str(text), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {one_line(error)}; pass another --output_dir"
            ) from None
    command = [part.replace("afterok:JOB", f"afterok:{','.join(before)}") for part in job.command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = "; ".join(
            SBATCH.sub("", line) for line in done.stderr.splitlines() if line.strip()
        )
        raise UserError(
            f"sbatch did not take the job: {one_line(reason)}; check --slurm_options, and that sinfo works"
        )
    return done.stdout.strip().partition(";")[0]  # NUMBER;CLUSTER


def _remove(folder: Path) -> None:
    """Remove the scripts of a job that was refused, and folders that hold nothing else."""
    for name in ("job.sh", "collect.sh"):
        (folder / name).unlink(missing_ok=True)
    for each in (folder, folder.parent):
        if each.is_dir() and not any(each.iterdir()):
            each.rmdir()
