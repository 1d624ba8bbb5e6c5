"""A student of the runs of a series: one model that learns the probabilities of all of them together."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from hf_cifar.config.recipes import expand_tokens, recipe_names
from hf_cifar.config.run import RunConfig
from hf_cifar.config.studies import CombineConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.models.names import check_models
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.processes import share_of_launcher
from hf_cifar.studies.series import run_of
from hf_cifar.text import nearest_hint

ENSEMBLE, STUDENT = "ensemble", "student"  # folders of a study


def student_of(name: str, argv: Sequence[str], prog: str) -> RunConfig:
    """Return the options of a student: those of the command line, replaced by those of `name`, which is a
    recipe, a YAML file of options, or a model. Data and output folder are always those of the command line.

    Raises: UserError for anything else.
    """
    if name in recipe_names():
        own = expand_tokens(["--recipe", name])
    elif name.endswith((".yaml", ".yml")):
        own = expand_tokens(["--config", name])
    else:
        own = ["--model_name_or_path", name]
    folds = RunConfig.parse(argv, prog)
    config = RunConfig.parse([*argv, *own], prog).with_training(output_dir=folds.train.output_dir)
    # A file may be the config.yaml of a run on other data.
    config = dataclasses.replace(config, data=folds.data)
    try:
        check_models(config)
    except UserError as error:
        raise UserError(f"--distill_into: {error}{nearest_hint(name, recipe_names())}") from None
    if config.train.teacher is not None:
        raise UserError(
            f"the student's teacher is the ensemble of the folds; leave out --teacher {config.train.teacher}"
        )
    if config.train.head_solver == "lbfgs":
        raise UserError(
            "a student is trained in steps, but --head_solver lbfgs has none; leave it out, or set it to "
            "optimizer in the student's file"
        )
    folder = Path(config.train.output_dir)
    return run_of(
        config, STUDENT, resume_from_checkpoint="last", teacher=str(folder / ENSEMBLE), seeds=1
    )


def require_one_process() -> None:
    """Raises: UserError under a launcher: runs are combined in one process."""
    if share_of_launcher()[1] > 1:
        raise UserError(
            "--distill_into combines the folds in one process; start hf-cifar kfold without a launcher, in "
            "as many processes as you like"
        )


def distil(runs: Sequence[RunConfig], student: RunConfig, source: DataSource) -> None:
    """Combine finished runs into an ensemble, and train a student of it, unless that has been done.

    The folders of the ensemble and the student are beside those of the runs. Other processes may make the
    same call, but none under the same launcher.

    """
    from hf_cifar.studies.combine import combine_runs  # these import torch
    from hf_cifar.studies.execution import alone_in, run_series

    assert student.train.teacher is not None
    teacher, train = RunFolder(student.train.teacher), student.train
    with alone_in(teacher.path.parent):
        missing = train.do_predict and "test" not in teacher.metrics()
        if missing or not teacher.facts():
            shutil.rmtree(teacher.path, ignore_errors=True)
            options = CombineConfig(
                output_dir=str(teacher.path), do_predict=train.do_predict, use_cpu=train.use_cpu,
                per_device_eval_batch_size=train.per_device_eval_batch_size,
            )  # fmt: skip
            combine_runs([run.train.output_dir for run in runs], options)
    run_series([student], source.sharing(student.data))
