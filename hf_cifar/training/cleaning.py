"""Leave out training images whose labels are probably wrong: --clean_labels.

Each image is predicted by a model that was not trained on it (cross-validation), and confident learning
compares the predictions with the labels. With a pretrained model, the backbone is frozen and only linear
heads are trained, on features that are computed once, in two rounds. Other models are trained once per fold,
like the run itself. Duplicates are not detected: copies of an image may be in several folds.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import tempfile
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from hf_cifar.audit.labels import doubted_labels
from hf_cifar.config.model import SCRATCH
from hf_cifar.config.run import RunConfig
from hf_cifar.config.training import WITHOUT_TEACHER
from hf_cifar.data.cache import load_array, save_array
from hf_cifar.data.labels import SHOWN_CLASSES, class_counts
from hf_cifar.data.split import Split, subset
from hf_cifar.data.splits import Splits
from hf_cifar.data.store import build_store, images_of
from hf_cifar.data.stratify import assign_folds
from hf_cifar.errors import UserError
from hf_cifar.models.fingerprint import add_weights
from hf_cifar.text import listed
from hf_cifar.training.autotune import computing_as
from hf_cifar.training.build import build_trainer, features_of
from hf_cifar.training.dataset import store_of
from hf_cifar.training.features import (
    PENALTIES,
    HeadSolver,
    has_feature_vectors,
    logits_of,
    search_penalties,
)
from hf_cifar.training.losses import evaluation_loss
from hf_cifar.training.resumable import DOUBTED, IDENTITY_FILE, random_states, set_random_states
from hf_cifar.training.schedules import FOLLOWS_A_METRIC
from hf_cifar.transforms.preprocessing import Preprocessing

if TYPE_CHECKING:  # hf_cifar.plan imports this package
    from hf_cifar.plan import Plan

logger = logging.getLogger(__name__)
FOLDS = 5
ROUNDS = 2  # of heads: the second is trained without the labels that the first finds probably wrong
# Options that may change on resume, but affect what a fold's model learns.
DECISIVE = {
    "num_train_epochs", "max_steps", "precision", "memory_format", "attention", "torch_compile",
}  # fmt: skip


def check_cleaning(config: RunConfig, splits: Splits) -> None:
    """Raises: UserError for data or options that --clean_labels does not support."""
    train = config.train
    if train.clean_labels == "none":
        return
    flag = f"--clean_labels {train.clean_labels}"
    if not isinstance(splits.train, Split):
        raise UserError(
            f"{flag} predicts every training image first, and a stream is not read in advance; leave out one "
            "of --clean_labels and --streaming"
        )
    if splits.multi_label:
        raise UserError(f"{flag} needs one label per image, and this data is multi-label")
    if config.data.check_images == "used":
        raise UserError(f"{flag} reads every training image first; leave out --check_images used")
    if train.lr_scheduler_type in FOLLOWS_A_METRIC:
        raise UserError(
            f"{flag} trains models without evaluations, which --lr_scheduler_type {train.lr_scheduler_type} "
            "needs; leave out one of them"
        )


def clean_labels(
    model: PreTrainedModel, image_processor: BaseImageProcessor, splits: Splits, plan: Plan
) -> Splits:
    """Return the splits without training images whose labels are probably wrong; validation keeps all images.

    On resume, the rows left out are read from the checkpoint. Otherwise they depend only on images, labels,
    weights and options, and are the same in every process. The weights and the random generators do not
    change.
    """
    option, train = plan.config.train.clean_labels, splits.train
    if option == "none":
        return splits
    assert isinstance(train, Split)  # see `check_cleaning`
    if plan.checkpoint is not None:
        saved = json.loads((plan.checkpoint / IDENTITY_FILE).read_text(encoding="utf-8"))
        if DOUBTED not in saved:
            raise UserError(
                f"--resume_from_checkpoint: {plan.checkpoint} is of a run without --clean_labels; leave one "
                "of them out"
            )
        doubted = np.array(saved[DOUBTED], np.int64).reshape(-1, 3)
    else:
        states = random_states(plan.processes.device)
        doubted = find_doubted(model, image_processor, splits, plan)
        set_random_states(states, plan.processes.device)
    announce(doubted, train, option)
    kept = np.flatnonzero(~np.isin(train.row_ids, doubted[:, 0]))
    return dataclasses.replace(
        splits, train=dataclasses.replace(subset(train, kept), doubted=doubted)
    )


def find_doubted(
    model: PreTrainedModel, image_processor: BaseImageProcessor, splits: Splits, plan: Plan
) -> np.ndarray:
    """Return row id, label and suggested label of each training image to leave out, int64 [D, 3]."""
    train, processes = splits.train, plan.processes
    assert isinstance(train, Split)
    preprocessing = Preprocessing.from_image_processor(image_processor)
    fold_of = checked_folds(train, plan.config.data.split_seed)
    pretrained = not plan.config.model.model_name_or_path.startswith(SCRATCH)
    model.to(processes.device)
    if pretrained and has_feature_vectors(model, preprocessing):
        found = [
            predicted_by_heads(model, train, fold_of, preprocessing, plan)
            if processes.is_main
            else None
        ]
    else:
        found = [predicted_by_trainings(model, image_processor, splits, fold_of, plan)]
    if processes.count > 1:
        broadcast_object_list(found)
    probabilities = found[0]
    assert probabilities is not None
    rows = find_among(probabilities, train.labels, fold_of)
    suggested = probabilities[rows].argmax(axis=1)
    return np.stack([train.row_ids[rows], train.labels[rows], suggested], axis=1)


def find_among(probabilities: np.ndarray, labels: np.ndarray, fold_of: np.ndarray) -> np.ndarray:
    """Return the positions of the labels that are probably wrong, among images that are in a fold."""
    rows = np.flatnonzero(fold_of >= 0)
    return rows[doubted_labels(probabilities[rows].astype(np.float64), labels[rows])]


def checked_folds(train: Split, seed: int) -> np.ndarray:
    """Return the fold [N] of each image, stratified; -1 for classes with too few images for every fold, which
    are trained on in all folds and are never left out."""
    counts = class_counts(train.labels, len(train.id2label))
    fold_of = np.where(counts[train.labels] < FOLDS, -1, assign_folds(train.labels, FOLDS, seed))
    small = [train.id2label[int(label)] for label in np.flatnonzero(counts < FOLDS)]
    if small:
        logger.info(
            "%s of %s classes have fewer than %d training images, and are not checked: %s",
            f"{len(small):,}", f"{len(counts):,}", FOLDS, listed(small, SHOWN_CLASSES),
        )  # fmt: skip
    return fold_of


def predicted_by_heads(
    model: PreTrainedModel,
    train: Split,
    fold_of: np.ndarray,
    preprocessing: Preprocessing,
    plan: Plan,
) -> np.ndarray:
    """Return out-of-fold probabilities [N, K] of linear heads on the features of the backbone."""
    logger.info(
        "--clean_labels: predicting each of %s training images with one of %d linear heads, not trained on "
        "that image, in %d rounds; this takes one forward pass per image, and solving for the heads",
        f"{len(train):,}", FOLDS, ROUNDS,
    )  # fmt: skip
    store = build_store(train, device=plan.processes.device)
    with computing_as(plan.setting, model):
        features = features_of(
            model, train, store, preprocessing, plan.config, decodes=store.decodes
        )
    digest = hashlib.sha256(f"solved heads {len(train.id2label)} {PENALTIES} {ROUNDS}".encode())
    for array in (features.features.cpu().numpy(), train.labels, fold_of):
        digest.update(np.ascontiguousarray(array).tobytes())
    probabilities = load_array(digest.hexdigest())
    if probabilities is None:
        labels, folds = features.labels, torch.from_numpy(fold_of).to(features.labels.device)
        trusted = torch.ones_like(folds, dtype=torch.bool)
        for _ in range(ROUNDS):
            solved = head_probabilities(
                features.features[0], labels, folds, trusted, len(train.id2label)
            )
            probabilities = solved.cpu().numpy()
            doubted = find_among(probabilities, train.labels, fold_of)
            trusted = torch.from_numpy(~np.isin(np.arange(len(train)), doubted)).to(folds.device)
        assert probabilities is not None
        save_array(digest.hexdigest(), probabilities)
    return probabilities


def head_probabilities(
    features: Tensor, labels: Tensor, fold_of: Tensor, trusted: Tensor, num_classes: int
) -> Tensor:
    """Return out-of-fold probabilities [N, K] of linear heads on features [N, D], at the penalty with the
    lowest cross-entropy on the held-out images.

    fold_of [N]: -1 for images on which all heads are trained. trusted [N]: False for labels on which no head
    is trained.
    """
    checked, loss = (fold_of >= 0) & trusted, evaluation_loss(multi_label=False)
    all_rows = HeadSolver(features, labels, num_classes, loss)
    solvers = [all_rows.of((fold_of != fold) & trusted) for fold in range(FOLDS)]

    def solve(penalty: float) -> tuple[Tensor, float]:
        logits = features.new_zeros(len(labels), num_classes)
        for fold, solver in enumerate(solvers):
            held_out = fold_of == fold
            logits[held_out] = logits_of(features[held_out], solver.solve(penalty))
        return logits, loss(logits[checked], labels[checked]).item()

    logits, *_ = search_penalties(solve)
    return logits.softmax(dim=1)


def predicted_by_trainings(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    splits: Splits,
    fold_of: np.ndarray,
    plan: Plan,
) -> np.ndarray:
    """Return out-of-fold probabilities [N, K] of models trained with the run's options, from its initial
    weights."""
    train = splits.train
    assert isinstance(train, Split)
    logger.info(
        "--clean_labels: predicting each of %s training images with one of %d models, not trained on that "
        "image; training them takes about %d times as long as the run itself",
        f"{len(train):,}", FOLDS, FOLDS - 1,
    )  # fmt: skip
    key, main = key_of_trainings(model, train, fold_of, plan), plan.processes.is_main
    probabilities = np.zeros((len(train), len(train.id2label)), np.float32)
    for fold in range(FOLDS):
        rows = np.flatnonzero(fold_of == fold)
        cached = [load_array(f"{key}-{fold}") if main else None]
        if plan.processes.count > 1:
            broadcast_object_list(cached)
        predicted = cached[0]
        if predicted is None:
            logger.info("--clean_labels: training model %d of %d", fold + 1, FOLDS)
            predicted = predicted_by_training(model, image_processor, train, rows, plan)
            if main:
                save_array(f"{key}-{fold}", predicted)
        probabilities[rows] = predicted
    return probabilities


def predicted_by_training(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    train: Split,
    rows: np.ndarray,
    plan: Plan,
) -> np.ndarray:
    """Train a copy of the model on all images but those in `rows` [B]; return its probabilities [B, K] for
    these rows. Nothing is kept on disk."""
    others = np.setdiff1d(np.arange(len(train)), rows)
    parts = Splits(subset(train, others), subset(train, rows))
    with tempfile.TemporaryDirectory() as own:
        folder: list[Any] = [own]  # written to only if a signal ends the training
        if plan.processes.count > 1:
            broadcast_object_list(folder)
        # A teacher may have seen the labels in doubt.
        trial = plan.config.as_trial(folder[0]).with_training(**WITHOUT_TEACHER)
        fold_plan = dataclasses.replace(plan, config=trial)
        trainer = build_trainer(copy.deepcopy(model), image_processor, parts, fold_plan)
        trainer.train()
        logits = trainer.predict(store_of(parts.validation, trainer.args)).predictions
        plan.processes.wait_for_all()
    return torch.from_numpy(np.asarray(logits)).float().softmax(dim=1).numpy()


def key_of_trainings(model: PreTrainedModel, train: Split, fold_of: np.ndarray, plan: Plan) -> str:
    """Return a hash of all that determines the predictions: images, labels, folds, weights and options."""
    fields = {each.name: each for part in vars(plan.config).values() if dataclasses.is_dataclass(part)
              for each in dataclasses.fields(part)}  # fmt: skip
    options = {
        name: value
        for name, value in plan.config.options().items()
        if name in DECISIVE or not (name in fields and fields[name].metadata["may_change"])
    }
    where = (plan.processes.count, plan.processes.device.type, torch.get_num_threads())
    pixels = images_of(train).pixel_hash or train.pixels.key_of(train.rows)
    digest = hashlib.sha256(json.dumps([options, where, pixels], default=str).encode())
    for array in (train.labels, fold_of):
        digest.update(array.tobytes())
    add_weights(digest, model.state_dict())
    return digest.hexdigest()


def announce(doubted: np.ndarray, train: Split, option: str) -> None:
    """Log how many images are left out, and the most frequent suggested changes of label."""
    pairs = Counter(map(tuple, doubted[:, 1:].tolist())).most_common()
    shown = listed(
        [
            f"{train.id2label[given]} -> {train.id2label[suggested]} {count:,}"
            for (given, suggested), count in pairs
        ],
        SHOWN_CLASSES,
    )
    logger.info(
        "--clean_labels %s: left out %s of %s training images (%.1f%%), whose labels are probably wrong%s",
        option, f"{len(doubted):,}", f"{len(train):,}", 100 * len(doubted) / len(train),
        f" (label -> suggested label): {shown}" if pairs else "",
    )  # fmt: skip
    before = class_counts(train.labels, len(train.id2label))
    lost = class_counts(doubted[:, 1], len(train.id2label))
    emptied = [
        f"{train.id2label[label]} ({lost[label]:,} of {before[label]:,})"
        for label in np.flatnonzero(lost > before / 2).tolist()
    ]
    if emptied:
        logger.warning(
            "--clean_labels %s: these classes lose more than half of their images: %s; rare classes are "
            "doubted wrongly more often, so look at doubted_rows in run.json",
            option, listed(emptied, SHOWN_CLASSES),
        )  # fmt: skip
