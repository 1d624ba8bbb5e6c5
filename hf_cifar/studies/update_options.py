"""The options of an update: those of its run, replaced by the given ones. Imports no torch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml

from hf_cifar.config.command_line import parse
from hf_cifar.config.data import DataConfig
from hf_cifar.config.objects import require_object
from hf_cifar.config.recipes import expand_tokens, yaml_tokens
from hf_cifar.config.run import RunConfig
from hf_cifar.config.training import WITHOUT_TEACHER, TrainingConfig
from hf_cifar.errors import UserError
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.processes import is_sharded
from hf_cifar.runs.resume import EVALUATION

logger = logging.getLogger(__name__)
# Options that say how any data are read, and are taken over from the run. The others select data.
DATA_KEPT = {
    "train_val_split", "split_seed", "pixel_store", "check_images", "on_bad_image", "max_image_pixels",
    "value_range",
}  # fmt: skip
# Options of the run that belong to its output, its machine, its weights or its teacher.
LEFT_OPEN = {
    "model_name_or_path", "model_revision", "grow_head", "output_dir", "run_name", "seeds", "do_predict",
    "check_leakage", "push_to_hub", "hub_model_id", "hub_revision", "precision", "memory_format", "attention",
    "torch_compile", "dataloader_num_workers", "freeze_batch_norm", "metric_for_best_model", *WITHOUT_TEACHER,
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
            f"{run.path} is an ensemble, which cannot be trained further; update one of its runs"
        )
    before = run.load_config()
    data = {each.name for each in dataclasses.fields(DataConfig)}
    # The options of when to evaluate and save belong together.
    left_open = LEFT_OPEN | (set() if flags.isdisjoint(EVALUATION) else EVALUATION)
    kept = {
        name: value
        for name, value in before.options().items()
        if name not in left_open and (name in DATA_KEPT or name not in data)
    }
    if kept["class_balance"] == "none":
        kept["class_balance"] = default_balance(run)
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


def default_balance(run: RunFolder) -> Literal["none", "post_hoc"]:
    """Return post_hoc, because each old class has fewer rows than a new one; or none where that does not
    work, and log why."""
    if run.model_config().get("problem_type") == "multi_label_classification":
        why = "images have multiple labels"
    elif is_sharded():
        why = "FSDP or DeepSpeed divides the head among processes"
    elif not has_biases(run):
        why = "the head has no biases"
    else:
        return "post_hoc"
    logger.info("--class_balance none instead of post_hoc, the default of an update: %s", why)
    return "none"


def has_biases(run: RunFolder) -> bool:
    """Return True if every layer of a saved model with one output per class has biases, by the header of its
    weights."""
    from safetensors import safe_open

    num_labels = len(run.model_config().get("id2label", {}))
    with safe_open(run.weights_path, "numpy") as weights:
        names = set(weights.keys())
        layers = [
            name.removesuffix("weight")
            for name in names
            if name.endswith("weight")
            and len(shape := weights.get_slice(name).get_shape()) == 2
            and shape[0] == num_labels
        ]
    return all(f"{layer}bias" in names for layer in layers)


def _folder_of(tokens: Sequence[str]) -> Path:
    train, *_ = parse([TrainingConfig], tokens, "hf-cifar update")
    return Path(train.output_dir)


def config_anew(run: RunFolder, config: RunConfig) -> RunConfig:
    """Return the options of the same training, but from the model that the run (or the first run of its
    chain) started from."""
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
    teaching = config.train if config.train.teacher else before.train
    config = config.with_training(
        output_dir=str(folder.path), **{name: getattr(teaching, name) for name in WITHOUT_TEACHER}
    )
    return dataclasses.replace(config, model=model, data=data)
