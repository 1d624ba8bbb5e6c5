"""The options of an update: those of its run, replaced by the given ones. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml

from hf_cifar.config.command_line import parse
from hf_cifar.config.data import DataConfig
from hf_cifar.config.objects import require_object
from hf_cifar.config.recipes import expand_tokens, yaml_tokens
from hf_cifar.config.run import RunConfig
from hf_cifar.config.training import TrainingConfig
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.resume import EVALUATION

# Options of the run that say how data are read, whichever they are. The others select data, and stay behind.
DATA_KEPT = {
    "train_val_split", "split_seed", "pixel_store", "check_images", "on_bad_image", "max_image_pixels",
    "value_range",
}  # fmt: skip
# Options of the run that belong to its output, its machine or its weights.
LEFT_OPEN = {
    "model_name_or_path", "model_revision", "grow_head", "output_dir", "run_name", "seeds", "do_predict",
    "check_leakage", "push_to_hub", "precision", "memory_format", "attention", "torch_compile",
    "dataloader_num_workers", "freeze_batch_norm", "metric_for_best_model",
}  # fmt: skip
SET_HERE = (
    "model_name_or_path",
    "grow_head",
    "stored_rows",
    "seeds",
    "resume_from_checkpoint",
    "push_to_hub",
)
ANEW = "anew"  # the folder of the run that is trained anew


def config_of_update(run: RunFolder, argv: Sequence[str]) -> RunConfig:
    """Return the options of an update: those of the run, replaced by the given ones.

    Raises: UserError for a run that cannot be continued, or an option that the update sets itself.
    """
    run.require_finished()
    given = expand_tokens(argv)
    flags = {
        token.partition("=")[0].removeprefix("--") for token in given if token.startswith("--")
    }
    for name in SET_HERE:
        if name in flags:
            raise UserError(f"--{name} does not work with hf-cifar update; leave it out")
    for name, what in (
        ("dataset_name", "the new data"),
        ("output_dir", "a new folder for the updated run"),
    ):
        if name not in flags:
            raise UserError(f"--{name} is missing; pass {what}")
    if "ensemble" in run.model_config().get("model_type", ""):
        raise UserError(
            f"{run.path} is an ensemble, which cannot be trained on; update one of its runs"
        )
    before = run.load_config()
    data = {each.name for each in dataclasses.fields(DataConfig)}
    # When to evaluate and save belongs together.
    left_open = LEFT_OPEN | (set() if flags.isdisjoint(EVALUATION) else EVALUATION)
    kept = {
        name: value
        for name, value in before.options().items()
        if name not in left_open and (name in DATA_KEPT or name not in data)
    }
    if kept["class_balance"] == "none" and not _has_many_labels(run):
        # Each old class has fewer rows than a new one.
        kept["class_balance"] = "post_hoc"
    values = run.facts().get("value_range")
    if values is not None:
        kept["value_range"] = ",".join(map(str, values))
    folder = _folder_of(given)
    if folder.resolve() == run.path.resolve():
        raise UserError(f"--output_dir {folder} is the run itself; pass a new folder")
    return RunConfig.parse(
        [
            *yaml_tokens(yaml.safe_dump(kept), str(run.config_path)), *given,
            "--model_name_or_path", str(run.path), "--grow_head", "true",
            "--stored_rows", str(RunFolder(folder).stored_path), "--resume_from_checkpoint", "last",
        ],
        "hf-cifar update",
    )  # fmt: skip


def _has_many_labels(run: RunFolder) -> bool:
    return run.model_config().get("problem_type") == "multi_label_classification"


def _folder_of(tokens: Sequence[str]) -> Path:
    train, *_ = parse([TrainingConfig], tokens, "hf-cifar update")
    return Path(train.output_dir)


def config_anew(run: RunFolder, config: RunConfig) -> RunConfig:
    """Return the options of the same training from the model that the run, or the first one of its chain,
    started from."""
    before = run.load_config()
    while before.model.grow_head:
        run = RunFolder(str(before.model.model_name_or_path))
        before = run.load_config()
    require_object(before.model.model_name_or_path, "model")
    folder = RunFolder(Path(config.train.output_dir) / ANEW)
    model = dataclasses.replace(
        config.model,
        model_name_or_path=before.model.model_name_or_path,
        model_revision=before.model.model_revision,
        grow_head=False,
    )
    data = dataclasses.replace(config.data, stored_rows=str(folder.stored_path))
    return dataclasses.replace(
        config.with_training(
            output_dir=str(folder.path),
            teacher=before.train.teacher,
            feature_hint=before.train.feature_hint,
        ),
        model=model,
        data=data,
    )
