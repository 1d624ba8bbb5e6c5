"""`hf-cifar kfold`."""

from __future__ import annotations

from collections.abc import Sequence

from hf_cifar.commands.command import Command, open_source
from hf_cifar.config.command_line import parse, wants_help
from hf_cifar.config.jobs import JobConfig
from hf_cifar.config.run import CONFIGS as RUN_CONFIGS
from hf_cifar.config.run import RunConfig, split_options
from hf_cifar.config.studies import KFoldConfig
from hf_cifar.errors import UserError
from hf_cifar.logs import quieten
from hf_cifar.models.names import check_models
from hf_cifar.runs.processes import is_main_process

CONFIGS = (KFoldConfig, *RUN_CONFIGS, JobConfig)
USAGE = "hf-cifar kfold [--folds N] [--recipe NAME] [--config FILE] [options of hf-cifar finetune]"
DESCRIPTION = (
    "Train a run for each fold, in OUTPUT_DIR/fold-NUMBER, and evaluate the predictions of all of them "
    "together. The same command continues after an interruption; several processes started with it at the "
    "same time share the folds."
)


def kfold(argv: Sequence[str]) -> int:
    """Cross-validate. Mistakes in options and images are found before torch is imported."""
    if wants_help(argv):
        parse(CONFIGS, ["--help"], "hf-cifar kfold", usage=USAGE, description=DESCRIPTION)
    from hf_cifar.studies.kfold import cross_validate, render_folds, runs_of_folds
    from hf_cifar.studies.series import check_same
    from hf_cifar.studies.student import require_one_process, student_of

    own, job, argv = split_options([KFoldConfig, JobConfig], argv, "hf-cifar kfold")
    config = RunConfig.parse(argv, "hf-cifar kfold")
    check_models(config)
    runs, student = runs_of_folds(config, own.folds), None
    if own.distill_into is not None:
        require_one_process()
        student = student_of(own.distill_into, argv, "hf-cifar kfold")
    check_same(runs if student is None else [*runs, student])
    if job.job is not None:
        return submit(job, own, config, runs, argv)
    source = open_source(runs[0].data, ["train", "validation"])

    quieten(is_main_process())
    cross_validate(config, own.folds, source, student)
    if is_main_process():
        print(render_folds(config.train.output_dir))
    return 0


def submit(
    job: JobConfig,
    own: KFoldConfig,
    config: RunConfig,
    runs: Sequence[RunConfig],
    argv: Sequence[str],
) -> int:
    """Submit the folds as an array instead of running them here."""
    from hf_cifar.jobs.job import check_job
    from hf_cifar.jobs.slurm import submit_slurm

    if job.job != "slurm":
        raise UserError(
            f"--job {job.job} submits a single run; pass --job slurm for all folds, or submit a job of "
            "hf-cifar finetune for each --fold"
        )
    check_job(config)
    student = [] if own.distill_into is None else ["--distill_into", own.distill_into]
    collect = ["kfold", "--folds", str(own.folds), *student, *argv]
    return submit_slurm(config, argv, runs, collect, job)


COMMAND = Command("train a run for each fold, and evaluate all of them together", kfold)
