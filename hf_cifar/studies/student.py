"""A student of the runs of a series: one model that learns the probabilities of all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_cifar.config.recipes import expand_tokens, recipe_names
from hf_cifar.config.run import RunConfig
from hf_cifar.config.studies import CombineConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.models.names import check_model_name
from hf_cifar.runs.folder import RunFolder
from hf_cifar.studies.series import run_of

ENSEMBLE, STUDENT = "ensemble", "student"  # folders of a study


def student_of(name: str, argv: Sequence[str], prog: str) -> RunConfig:
    """Return the options of a student: those of the command line, then those of `name`, which is a recipe, a
    YAML file of options, or a model.

    Raises: UserError for anything else.
    """
    if name in recipe_names():
        own = expand_tokens(["--recipe", name])
    elif name.endswith((".yaml", ".yml")):
        own = expand_tokens(["--config", name])
    else:
        own = ["--model_name_or_path", name]
    config = RunConfig.parse([*argv, *own], prog)
    model = config.model
    check_model_name(
        model.model_name_or_path, model.model_revision, trust_remote_code=model.trust_remote_code
    )
    if config.train.teacher is not None:
        raise UserError(
            f"the student's teacher is the ensemble of the folds; leave out --teacher {config.train.teacher}"
        )
    if config.train.head_solver == "lbfgs":
        raise UserError(
            "a student trains in steps, and --head_solver lbfgs has none; leave it out, or set it to "
            "optimizer in the student's file"
        )
    folder = Path(config.train.output_dir)
    return run_of(
        config, STUDENT, resume_from_checkpoint="last", teacher=str(folder / ENSEMBLE), seeds=1
    )


def distil(runs: Sequence[RunConfig], student: RunConfig, source: DataSource) -> None:
    """Combine finished runs into an ensemble, and train a student of it, unless that has been done.

    The folders of the ensemble and the student are beside those of the runs. Other processes may do the same.
    """
    from hf_cifar.studies.combine import combine_runs  # these import torch
    from hf_cifar.studies.execution import alone_in, run_series

    assert student.train.teacher is not None
    teacher, train = RunFolder(student.train.teacher), student.train
    with alone_in(teacher.path.parent):
        if not teacher.facts():
            options = CombineConfig(
                output_dir=str(teacher.path), do_predict=train.do_predict, use_cpu=train.use_cpu,
                per_device_eval_batch_size=train.per_device_eval_batch_size,
            )  # fmt: skip
            combine_runs([run.train.output_dir for run in runs], options)
    run_series([student], source.sharing(student.data))
