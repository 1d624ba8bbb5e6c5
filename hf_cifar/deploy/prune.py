"""Prune the network of a run to a target of size or latency, and fine-tune what is left."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel

from hf_cifar.config.deployment import ExportConfig, PruneConfig
from hf_cifar.config.run import RunConfig
from hf_cifar.data.split import Split
from hf_cifar.data.splits import DataSource
from hf_cifar.data.streams import Stream
from hf_cifar.deploy.channels import closest_ratio, count_parameters, pruned_copy, ratios_of
from hf_cifar.deploy.export import export_classifier
from hf_cifar.deploy.formats import require_format
from hf_cifar.deploy.importance import Importances, measure_importances
from hf_cifar.deploy.inputs import inputs_of
from hf_cifar.deploy.latency import latencies
from hf_cifar.deploy.preflight import check_prune
from hf_cifar.errors import UserError
from hf_cifar.extras import require
from hf_cifar.finetune import finetune_classifier
from hf_cifar.models.build import load_classifier
from hf_cifar.models.classifier import describe
from hf_cifar.models.modules import ModuleConfig, ModuleForImageClassification
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.progress import progress
from hf_cifar.run_data import open_data, used_splits
from hf_cifar.runs.folder import RunFolder, new_folder, write_json
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
IMAGES, BATCH = 500, 50  # of training, for the importance of channels
EXPORTED = "model.onnx"  # of a network that no config describes


def prune_run(folder: str | Path, config: PruneConfig) -> Path:
    """Prune and fine-tune the network of a finished run, write it to `config.output_dir`, and return its
    path.

    The path is that folder. If no config describes the pruned network, `from_pretrained` cannot load its
    weights; then an ONNX file is written in the folder, and its path is returned.
    Raises: UserError for a target that pruning cannot reach, a run that is not finished, or whose data are
    missing or have changed.
    """
    check_prune(Path(folder), config)
    require("torch_pruning", extra="deploy")
    run = RunFolder(folder)
    source = open_data(run, config.dataset_name)
    options = dataclasses.replace(run.load_config(), data=source.config)
    model, image_processor = load_classifier(
        str(folder), trust_remote_code=options.model.trust_remote_code
    )
    size = Preprocessing.from_image_processor(image_processor).size
    importances = _importances(model, image_processor, used_splits(run, source).train)
    ratio = _ratio(model, size, importances, config)
    pruned = pruned_copy(model, ratio, size, importances)
    before, after = count_parameters(model), count_parameters(pruned)
    logger.info(
        "pruning ratio %.3f: %s of %s parameters are left (%.1f%%)",
        ratio, f"{after:,}", f"{before:,}", 100 * after / before,
    )  # fmt: skip
    if doubted := run.facts().get("doubted_rows"):
        logger.info(
            "%s images that the run left out as doubted train again", f"{doubted['num_rows']:,}"
        )
    described = isinstance(pruned, PreTrainedModel)
    tuned = _fine_tuning(options, config, described=described)
    if described:
        return finetune_classifier(
            tuned, source, model_name_or_path=(pruned, image_processor)
        ).output_dir
    network = ModuleForImageClassification(ModuleConfig(f"{describe(model)}, pruned"), pruned)
    return _as_onnx(network, image_processor, source, tuned)


def _importances(
    model: PreTrainedModel, image_processor: BaseImageProcessor, train: Split | Stream
) -> Importances:
    """Measure the importance of each channel on training images."""
    inputs = inputs_of(train, IMAGES, Preprocessor.of(model, image_processor))
    batches = [
        (torch.from_numpy(inputs.pixel_values[start : start + BATCH]),
         torch.from_numpy(inputs.labels[start : start + BATCH]))
        for start in range(0, len(inputs.labels), BATCH)
    ]  # fmt: skip
    return measure_importances(model, progress(batches, "measuring importance", unit="batches"))


def _ratio(
    model: PreTrainedModel, size: tuple[int, int], importances: Importances, config: PruneConfig
) -> float:
    """Return the share of channels to remove. Raises: UserError if no share reaches the target."""
    if config.target_size is not None:
        target, what, unit = config.target_size, "target_size", "parameters"
        whole = count_parameters(model)

        def left(ratio: float) -> float:
            return count_parameters(pruned_copy(model, ratio, size, importances)) / whole
    else:
        assert config.target_latency is not None
        target, what, unit = config.target_latency, "target_latency", "time of one image"

        def left(ratio: float) -> float:
            return _relative_latency(model, pruned_copy(model, ratio, size, importances), size)

    left = functools.cache(left)  # a second measurement of a time would differ
    ratios = ratios_of(model)
    ratio = closest_ratio(ratios, lambda ratio: left(ratio) <= target)
    if ratio is None:
        least = left(ratios[-1]) if ratios else 1.0
        raise UserError(
            f"--{what} is {target:g}, and pruning leaves at least {least:.3g} of the {unit}; pass a larger "
            "share"
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


def _fine_tuning(options: RunConfig, config: PruneConfig, *, described: bool) -> RunConfig:
    """Return the options of fine-tuning: those of the run, but all layers train, and what fits the network
    and this machine is found anew. described: the network is of the run's family.

    The learning rates are the run's if all layers trained there, and the network still has these layers. A
    single rate for all layers is always kept.
    """
    train = options.train
    all_layers = options.model.freeze == "none" and not options.model.lora_rank
    by_layer = train.layer_decay != 1 or train.backbone_learning_rate is not None
    same_rates = all_layers and (described or not by_layer) and config.learning_rate is None
    rates: dict[str, Any] = {"learning_rate": config.learning_rate}
    if same_rates:
        rates = {"learning_rate": train.learning_rate}
    else:
        rates |= {"layer_decay": 1.0, "backbone_learning_rate": None}
    if config.num_train_epochs is not None:
        rates |= {"num_train_epochs": config.num_train_epochs, "max_steps": -1}
    return options.with_options(
        **rates,
        output_dir=config.output_dir,
        image_size=None, freeze="none", lora_rank=0, dropout=None, drop_path=None, head_solver="optimizer",
        clean_labels="none", unfreeze_epochs=0, seeds=1, run_name=None, push_to_hub=False, hub_model_id=None,
        precision="auto", memory_format="auto", attention="auto", torch_compile=False,
    )  # fmt: skip


def _as_onnx(
    pruned: ModuleForImageClassification,
    image_processor: BaseImageProcessor,
    source: DataSource,
    tuned: RunConfig,
) -> Path:
    """Fine-tune a network that no config describes, and write it as ONNX, with metrics and predictions."""
    require_format("onnx")
    output = Path(tuned.train.output_dir)
    with new_folder(output) as unfinished:
        training = unfinished / "training" / output.name  # a run is named after its folder
        aside = tuned.with_training(output_dir=str(training))
        result = finetune_classifier(aside, source, model_name_or_path=(pruned, image_processor))
        model: Any = result.model
        export_classifier(
            model.cpu(), image_processor, training,
            ExportConfig(output=str(unfinished / EXPORTED), parity_images=0),
        )  # fmt: skip
        run = RunFolder(training)
        shutil.copy(run.metrics_path, unfinished / run.metrics_path.name)
        facts = run.facts() | {"parameters": count_parameters(pruned)}
        write_json(RunFolder(unfinished).facts_path, facts)
        shutil.copytree(run.path / "predictions", unfinished / "predictions")
        settled = run.load_config().with_training(output_dir=str(output))
        RunFolder(unfinished).save_config(settled)
        shutil.rmtree(training.parent)
    logger.info("no config describes the pruned network, so it is written as ONNX only")
    return output / EXPORTED
