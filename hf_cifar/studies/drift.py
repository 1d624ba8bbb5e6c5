"""Test whether images are like those of a run. The reference is the run's own validation images."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, List
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_cifar.config.data import DataConfig, is_same_source
from hf_cifar.config.studies import DriftConfig
from hf_cifar.data.columns import quiet_datasets
from hf_cifar.data.pixels import Pixels
from hf_cifar.data.split import Split, prepare_split, subset
from hf_cifar.data.store import build_store, take_batch
from hf_cifar.data.unlabelled import UnlabelledImages, load_images
from hf_cifar.errors import UserError
from hf_cifar.evaluation.predictions import outcome_of
from hf_cifar.hub.origin import public_name
from hf_cifar.models.build import load_classifier
from hf_cifar.models.heads import linear_head
from hf_cifar.models.problem_type import is_multi_label, thresholds_of
from hf_cifar.models.value_range import value_range_of
from hf_cifar.progress import progress
from hf_cifar.report.drift import Outputs, compare_outputs, render_page
from hf_cifar.run_data import open_data, used_splits
from hf_cifar.runs.folder import (
    DRIFT_FILES,
    RunFolder,
    new_folder,
    refuse_other_files,
    write_json,
    write_text,
)
from hf_cifar.training.features import feature_store, has_feature_vectors
from hf_cifar.transforms.augmentation import Augmentation
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
SEED = 0  # of the drawn images
FEWEST = 20  # images; fewer show nothing
BATCH = 64


def detect_drift(run: str | Path, data_name: str, config: DriftConfig) -> dict[str, Any]:
    """Compare images with the validation images of a run; labels of the images are not read.

    Returns the facts, which are also in drift.json, with the page, if there is an output folder.
    Raises: UserError for a run whose data are missing or have changed, or too few images.
    """
    if config.output_dir is not None:
        refuse_other_files(Path(config.output_dir), DRIFT_FILES)  # which would be lost
    files = RunFolder(run)
    images, data = open_images(data_name, config, files.data())
    validation = used_splits(files, open_data(files, config.dataset_name)).validation
    trust = files.load_config().model.trust_remote_code
    model, image_processor = load_classifier(str(run), trust_remote_code=trust)
    on_gpu = torch.cuda.is_available() and not config.use_cpu
    device = torch.device("cuda" if on_gpu else "cpu")
    model = model.to(device, memory_format=torch.channels_last).eval()
    preprocessing = Preprocessing.from_image_processor(image_processor)
    drawn = subset(validation, draw(len(validation), config.num_images))
    unlabelled = unlabelled_split(images, draw(len(images), config.num_images), model, data)
    reference, new = (
        prepare_split(each, preprocessing, on_bad_image="skip", device=device)
        for each in (drawn, unlabelled)
    )
    check_size(reference, len(validation), "validation images of the run")
    check_size(new, len(images), f"readable images of {data_name}")
    known, found = (compute_outputs(model, each, preprocessing) for each in (reference, new))
    facts = {
        "run": public_name(str(run)),
        "data": public_name(data_name),
        "split": config.split,
        "num_validation": len(validation),
        "num_available": len(images),
        "num_unreadable": len(new.skipped),
        "has_features": has_feature_vectors(model, preprocessing),
        **compare_outputs(known, found, reference.id2label, config.alpha, config.gallery_size),
    }
    for row in facts["strangest"]:
        number = int(new.row_ids[row["position"]])
        (cell,) = images.cells(range(number, number + 1))
        row |= {"row": number, "name": images.name(cell) or f"row {number}"}
    if config.output_dir is not None:
        write_drift(Path(config.output_dir), facts, new)
    return facts


def open_images(
    data_name: str, config: DriftConfig, own: DataConfig
) -> tuple[UnlabelledImages, DataConfig]:
    """Open the new images, and return them with their options. own: the data of the run."""
    data = DataConfig(
        dataset_name=data_name, dataset_config_name=config.dataset_config_name,
        image_column_name=config.image_column_name, max_image_pixels=own.max_image_pixels,
    )  # fmt: skip
    if is_same_source(own, data) and config.split != "test":
        logger.warning(
            "%s is the data of the run: the model was trained on these images, which may count as drift; "
            "pass --split test, or other data", data_name,
        )  # fmt: skip
    return load_images(data, config.split), data


def write_drift(output: Path, facts: dict[str, Any], new: Split) -> None:
    """Write drift.json and drift.html into a folder, in place of earlier ones."""
    pictures = {row["position"]: new.decode(row["position"]) for row in facts["strangest"]}
    facts_file, page_file = DRIFT_FILES
    with new_folder(output) as folder:
        write_json(folder / facts_file, facts)
        write_text(folder / page_file, render_page(facts, pictures))


def draw(count: int, most: int) -> np.ndarray:
    """Draw up to `most` of `count` images, and return their numbers, sorted."""
    return np.sort(np.random.default_rng(SEED).permutation(count)[:most])


def check_size(split: Split, available: int, what: str) -> None:
    """Log how many images are used if not all are. Raises: UserError for too few."""
    if len(split) < FEWEST:
        raise UserError(
            f"there are only {len(split)} {what}, and drift cannot be detected with fewer than {FEWEST}; "
            "pass another run, or more images"
        )
    if len(split) + len(split.skipped) < available:
        numbers = f"{len(split):,}", f"{available:,}"
        logger.info("%s of %s %s are compared, drawn with a fixed seed", *numbers, what)


def unlabelled_split(
    images: UnlabelledImages, rows: np.ndarray, model: PreTrainedModel, data: DataConfig
) -> Split:
    """Make a split of some images. Its labels are placeholders: the first class, or none for multi-label
    models. Its row ids are the numbers of the images."""
    label: Any = ClassLabel(
        names=[model.config.id2label[i] for i in range(model.config.num_labels)]
    )
    values: list[Any] = [0] * len(rows)
    if is_multi_label(model):
        label, values = List(label), [[]] * len(rows)
    with quiet_datasets():
        labelled = images.rows.select(rows).add_column("label", values, feature=label)
    pixels = Pixels(
        public_name(str(data.dataset_name)),
        labelled,
        rows,
        data.max_image_pixels,
        value_range_of(model),
    )
    return Split("new images", pixels, np.arange(len(rows)))


def compute_outputs(model: PreTrainedModel, split: Split, preprocessing: Preprocessing) -> Outputs:
    """Compute the outputs of a prepared split. Features are loaded from the disk cache if they were computed
    before; a model without one feature vector per image has its logits as features."""
    device = next(model.parameters()).device
    store = build_store(split, device=device)
    head = linear_head(model)
    if head is not None and has_feature_vectors(model, preprocessing):
        found = feature_store(model, split, store, preprocessing, Augmentation()).features[0]
        with torch.inference_mode():
            logits = head(found).float().cpu().numpy()
        features = found.cpu().numpy()
    else:
        logger.info(
            "%s: the logits are used as features, because the head is not one linear layer",
            split.name,
        )
        parts = []
        for batch in progress(
            DataLoader(store, BATCH, collate_fn=take_batch), f"predicting {split.name}"
        ):
            with torch.inference_mode():
                pixel_values = preprocessing(batch["pixel_values"].to(device))
                parts.append(model(pixel_values=pixel_values).logits.float().cpu())
        features = logits = torch.cat(parts).numpy()
    bad = int((~np.isfinite(features)).any(axis=1).sum())
    if bad:
        raise UserError(
            f"the model's features for {bad:,} of {len(features):,} {split.name} are not finite; pass "
            "another run"
        )
    return Outputs(features, outcome_of(logits, split.labels, thresholds=thresholds_of(model)))
