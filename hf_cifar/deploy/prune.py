"""Prune the network of a run to a target of size or latency, and fine-tune what is left."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from hf_cifar.config.deployment import ExportConfig, PruneConfig
from hf_cifar.config.objects import require_object
from hf_cifar.config.run import RunConfig
from hf_cifar.data.split import Split
from hf_cifar.data.splits import DataSource
from hf_cifar.data.streams import Stream
from hf_cifar.deploy.channels import Logits, closest_ratio, count_parameters, pruned_copy, ratios_of
from hf_cifar.deploy.export import export_classifier
from hf_cifar.deploy.formats import require_format
from hf_cifar.deploy.importance import Importances, measure_importances
from hf_cifar.deploy.inputs import inputs_of
from hf_cifar.deploy.latency import latencies
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.finetune import finetune_classifier
from hf_cifar.models.build import load_classifier
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.progress import progress
from hf_cifar.runs.folder import RunFolder
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
IMAGES, BATCH = 500, 50  # of training, for the importance of channels
EXPORTED = "model.onnx"  # of a network that no config describes


def prune_run(folder: str | Path, config: PruneConfig) -> Path:
    """Prune and fine-tune the network of a finished run, as a run in `config.output_dir`; return its model.

    That is the folder, or the ONNX file in it if no config describes the pruned network: `from_pretrained`
    could not load its weights, so they are not written.
    Raises: UserError for a target that pruning cannot reach, a run that is not finished, or whose data or
    model was a Python object.
    """
    run = RunFolder(folder)
    run.require_finished()
    options = run.load_config()
    require_object(options.data.dataset_name, "data set")
    RunFolder(config.output_dir).refuse_occupied()
    require("torch_pruning", extra="deploy")
    model, image_processor = load_classifier(
        str(folder), trust_remote_code=options.model.trust_remote_code
    )
    size = Preprocessing.from_image_processor(image_processor).size
    importances = _importances(model, image_processor, DataSource(options.data).splits.train)
    ratio = _ratio(model, size, importances, config)
    pruned = pruned_copy(model, ratio, size, importances)
    before, after = count_parameters(model), count_parameters(pruned)
    logger.info(
        "removed %.1f%% of the channels: %s of %s parameters are left (%.1f%%)",
        100 * ratio, f"{after:,}", f"{before:,}", 100 * after / before,
    )  # fmt: skip
    tuned = _fine_tuning(options, config)
    if isinstance(pruned, PreTrainedModel):
        return finetune_classifier(tuned, model_name_or_path=(pruned, image_processor)).output_dir
    return _as_onnx(pruned, image_processor, tuned)


def _importances(
    model: PreTrainedModel, image_processor: BaseImageProcessor, train: Split | Stream
) -> Importances:
    """Measure the importance of each channel on training images."""
    inputs = inputs_of(train, IMAGES, Preprocessor.of(model, image_processor))
    starts = progress(range(0, len(inputs.labels), BATCH), "measuring importance", unit="batches")
    return measure_importances(
        model,
        (
            tuple(
                map(
                    torch.from_numpy,
                    (inputs.pixel_values[i : i + BATCH], inputs.labels[i : i + BATCH]),
                )
            )
            for i in starts
        ),
    )


def _ratio(
    model: PreTrainedModel, size: tuple[int, int], importances: Importances, config: PruneConfig
) -> float:
    """Return the share of channels to remove. Raises: UserError if no share reaches the target."""
    if config.target_size is not None:
        target, what = config.target_size, f"--target_size {config.target_size:g}"
        whole = count_parameters(model)

        def left(ratio: float) -> float:
            return count_parameters(pruned_copy(model, ratio, size, importances)) / whole
    else:
        assert config.target_latency is not None
        target, what = config.target_latency, f"--target_latency {config.target_latency:g}"

        def left(ratio: float) -> float:
            return _relative_latency(model, pruned_copy(model, ratio, size, importances), size)

    ratios = ratios_of(model)
    ratio = closest_ratio(ratios, lambda ratio: left(ratio) <= target)
    if ratio is None:
        raise UserError(
            f"{what}: {left(ratios[-1]):.3g} of the network is left when almost all channels that can go are "
            "removed; pass a larger share"
        )
    return ratio


@torch.inference_mode()
def _relative_latency(model: nn.Module, pruned: nn.Module, size: tuple[int, int]) -> float:
    """Return the time of one image with a pruned network, relative to that with the whole one."""
    networks = {
        name: lambda images, each=each: each(pixel_values=torch.from_numpy(images))
        for name, each in (("whole", model.eval()), ("pruned", pruned.eval()))
    }
    found = latencies(networks, np.zeros((1, 3, *size), np.float32), batch_sizes=(1,), rounds=3)
    return found["pruned"]["1"]["median"] / found["whole"]["1"]["median"]


def _fine_tuning(options: RunConfig, config: PruneConfig) -> RunConfig:
    """Return the options of fine-tuning: those of the run, but all layers train. Its learning rate is the
    run's if all layers trained there, else the default."""
    all_layers = options.model.freeze == "none" and not options.model.lora_rank
    return options.with_options(
        output_dir=config.output_dir,
        num_train_epochs=config.num_train_epochs or options.train.num_train_epochs,
        learning_rate=config.learning_rate or (options.train.learning_rate if all_layers else None),
        image_size=None, freeze="none", lora_rank=0, head_solver="optimizer", clean_labels="none",
        unfreeze_epochs=0, layer_decay=1.0, backbone_learning_rate=None, seeds=1, run_name=None,
        push_to_hub=False,
    )  # fmt: skip


def _as_onnx(pruned: Logits, image_processor: BaseImageProcessor, tuned: RunConfig) -> Path:
    """Fine-tune a network that no config describes, and write it as ONNX, with metrics and predictions."""
    require_format("onnx")
    output = Path(tuned.train.output_dir)
    with tempfile.TemporaryDirectory(prefix="hf_cifar-prune-") as folder:
        aside = tuned.with_training(output_dir=str(Path(folder, "run")))
        result = finetune_classifier(aside, model_name_or_path=(pruned, image_processor))
        model: Any = result.model
        output.mkdir(parents=True, exist_ok=True)
        export_classifier(
            model.cpu(), image_processor, result.output_dir,
            ExportConfig(output=str(output / EXPORTED), parity_images=0),
        )  # fmt: skip
        run = RunFolder(result.output_dir)
        for path in (run.metrics_path, run.facts_path):
            shutil.copy(path, output / path.name)
        shutil.copytree(run.path / "predictions", output / "predictions")
        RunFolder(output).save_config(tuned)
    logger.info("no config describes the pruned network, so it is written as ONNX only")
    return output / EXPORTED
