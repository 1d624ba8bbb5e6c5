"""Submit a fine-tuning to HF Jobs: stage its files in a private repository, start it, and follow its log."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cifar.config.jobs import JobConfig
from hf_cifar.config.model import BUNDLED
from hf_cifar.config.run import RunConfig
from hf_cifar.errors import UserError
from hf_cifar.hub.push import Access, Target, check_access, check_online, reason_of
from hf_cifar.hub.reach import looks_like_path
from hf_cifar.jobs.job import Job, job_name
from hf_cifar.jobs.staging import CONFIG, extras_of, stage_run
from hf_cifar.text import megabytes

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, HfApi, JobInfo, JobStatus

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"  # Debian with Python and uv
MOUNT = "/inputs"  # where the job reads its files
OUTPUT = "outputs/finetuned"  # on the job's machine, which is removed when it ends
REPOSITORY = "hf-cifar-jobs"  # of the user, for the files of all jobs
TIMEOUT = "6h"
FAILED = 1
LAST_LINES = 10


def submit_hf_jobs(config: RunConfig, options: JobConfig) -> int:
    """Show what will be sent, send it, and follow the job's log; return 0 if it succeeds or is detached from,
    1 if it fails.

    Raises: UserError for a run that cannot work there, before anything is sent, or if the Hub refuses it.
    """
    check_for_hf_jobs(config)
    check_online("--job hf_jobs", None)
    data = config.data.dataset_name
    if not (data.startswith(BUNDLED) or looks_like_path(data)) and _find_data_set(data) is None:
        raise UserError(
            f"no data set {data} on the Hub, or it is private or gated; check the name, or pass a folder"
        )
    access = check_access(Target.of_run(config.train))
    repository = f"{access.user}/{REPOSITORY}"
    with tempfile.TemporaryDirectory(prefix="hf_cifar-") as scratch:
        job = plan_job(config, options, access, Path(scratch))
        is_new = _is_new(repository)
        folder = _folder_of(job)
        print(job.render(), end="\n\n", flush=True)
        state = "new" if is_new else "existing"
        size = megabytes(job.num_bytes)
        print(f"{size} for the {state} private data set repository {repository}, in {folder}/")
        if options.dry_run:
            print("nothing was sent: leave out --dry_run to submit")
            return 0
        info = _send(job, options, repository, folder)
    return follow(info, access.repo_id)


def check_for_hf_jobs(config: RunConfig) -> None:
    """Raises: UserError for options that cannot work on a machine that is removed when the job ends."""
    train = config.train
    if not train.hub_model_id:
        raise UserError(
            "--hub_model_id is missing; pass the repository that the result is pushed to, NAME or "
            "NAMESPACE/NAME (the machine of a job is removed when it ends)"
        )
    if train.seeds > 1:
        raise UserError(
            "--job hf_jobs pushes one model; leave out --seeds, or submit a job for each --seed"
        )
    if train.resumes:
        raise UserError(
            "--resume_from_checkpoint needs a folder on this machine, which the job cannot read; leave it out"
        )


def plan_job(config: RunConfig, options: JobConfig, access: Access, scratch: Path) -> Job:
    """Return the job of a run. scratch: a folder for the files that are made for it."""
    train = config.train
    train = dataclasses.replace(
        train, push_to_hub=True, hub_model_id=access.repo_id, output_dir=OUTPUT,
        # The shorthands are not saved in config.yaml.
        precision="bf16" if train.bf16 else "fp16" if train.fp16 else train.precision,
    )  # fmt: skip
    files, there = stage_run(dataclasses.replace(config, train=train), MOUNT, scratch)
    wheel = next(name for name in files if name.endswith(".whl"))
    extras = ",".join(extras_of(there))
    requirement = f"hf-cifar{f'[{extras}]' if extras else ''} @ file://{MOUNT}/{wheel}"
    gpus = re.search(r"x(\d+)$", options.flavor or "")
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", gpus[1]] if gpus else []
    )
    return Job(
        name=job_name(access.repo_id.partition("/")[2]),
        facts={
            "machine": f"HF Jobs, {options.flavor}, as {access.user}, at most {_timeout(options)}",
            "image": IMAGE,
            "result": f"{access.repo_id}, {'new' if access.is_new else 'existing'}, {access.visibility}",
        },
        command=[
            "uv", "run", "--no-project", "--with", requirement,
            "python", *launch, "-m", "hf_cifar", "finetune", "--config", f"{MOUNT}/{CONFIG}",
        ],
        environment={"PYTHONUNBUFFERED": "1"},
        secrets=("HF_TOKEN",),
        files=files,
    )  # fmt: skip


def _timeout(options: JobConfig) -> str:
    return options.job_timeout or TIMEOUT


def _folder_of(job: Job) -> str:
    """Return the folder of a job's files in the repository, named by their content: a job that is submitted
    again uploads nothing again."""
    digest = hashlib.sha256()
    for name, file in job.files.items():
        digest.update(f"{name}\0".encode())
        if isinstance(file, str):
            digest.update(hashlib.sha256(file.encode()).digest())
        else:
            with file.open("rb") as source:
                digest.update(hashlib.file_digest(source, "sha256").digest())
    return digest.hexdigest()[:16]


def _is_new(repository: str) -> bool:
    """Return True if the repository for staged files does not exist. Raises: UserError if it is public."""
    info = _find_data_set(repository)
    if info is not None and not info.private:
        raise UserError(
            f"{repository} is public, and local files would be uploaded to it; make it private, or delete it"
        )
    return info is None


def _find_data_set(name: str) -> DatasetInfo | None:
    """Ask the Hub about a data set; None if it does not exist, or not for this token."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return HfApi().dataset_info(name)
    except (RepositoryNotFoundError, HFValidationError):
        return None
    except Exception as error:  # the client raises its own, httpx's and OS errors
        raise UserError(f"--job hf_jobs: cannot read data set {name}: {reason_of(error)}") from None


def _send(job: Job, options: JobConfig, repository: str, folder: str) -> JobInfo:
    """Upload the files of a job, and start it. Raises: UserError for a refusal by the Hub."""
    from huggingface_hub import CommitOperationAdd, HfApi, Volume, get_token

    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        commit = api.create_commit(
            repository,
            [
                CommitOperationAdd(
                    f"{folder}/{name}", file.encode() if isinstance(file, str) else file
                )
                for name, file in job.files.items()
            ],
            commit_message=f"Files of a job: {folder}",
            repo_type="dataset",
        )
    except Exception as error:  # as above
        raise UserError(
            f"the files of the job cannot be uploaded to {repository}: {reason_of(error)}"
        ) from None
    volume = Volume(
        type="dataset", source=repository, mount_path=MOUNT, revision=commit.oid, path=folder
    )
    namespace = repository.partition("/")[0]
    try:
        return api.run_job(
            image=IMAGE,
            command=job.command,
            env=job.environment,
            secrets={name: get_token() for name in job.secrets},
            flavor=options.flavor,
            timeout=_timeout(options),
            name=job.name,
            volumes=[volume],
            namespace=namespace,
        )
    except Exception as error:  # as above
        raise UserError(
            f"HF Jobs refused the job: {reason_of(error)}; its files stay in {repository}/{folder}"
        ) from None


def follow(info: JobInfo, repo_id: str) -> int:
    """Print the log of a job until it ends. Ctrl-C detaches from the job, which goes on. repo_id: of the
    result. Returns the exit status.

    Raises: UserError if its log or state cannot be read; the job goes on then too.
    """
    from huggingface_hub import HfApi

    job_id, owner = info.id, info.owner.name
    next_steps = f"follow it: hf jobs logs --follow {job_id}; cancel it: hf jobs cancel {job_id}"
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        print(f"job {job_id}: {info.url}; Ctrl-C detaches", flush=True)
        status = _print_log(HfApi(), job_id, owner, last)
    except KeyboardInterrupt:
        print(f"\ndetached; job {job_id} goes on; {next_steps}")
        return 0
    except Exception as error:  # as above
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(
            f"the log of job {job_id} cannot be read: {reason_of(error)}; the job goes on; {next_steps}"
        ) from None
    if status.stage == "COMPLETED":
        print(f"job {job_id} finished; the model is on the Hub: {repo_id}")
        return 0
    reason = f" ({status.message})" if status.message else ""
    print(
        f"hf-cifar: error: job {job_id} ended: {status.stage}{reason}; its last lines:",
        file=sys.stderr,
    )
    for line in last:
        print(f"  {line}", file=sys.stderr)
    return FAILED


def _print_log(api: HfApi, job_id: str, namespace: str, last: deque[str]) -> JobStatus:
    for line in api.fetch_job_logs(job_id=job_id, namespace=namespace, follow=True):
        print(line.rstrip("\n"), flush=True)
        last.append(line.rstrip("\n"))
    return api.inspect_job(job_id=job_id, namespace=namespace).status
