"""Construction of a run's Trainer, with its stores or features and its augmentation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import (
    BaseImageProcessor,
    EarlyStoppingCallback,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
)

from hf_cifar.config.run import RunConfig
from hf_cifar.config.training import TrainingConfig
from hf_cifar.data.labels import class_counts
from hf_cifar.data.split import Split
from hf_cifar.data.splits import Splits, prepare_splits
from hf_cifar.data.store import PreparedStore, ResidentStore, ShardStore, default_num_workers
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.models.heads import has_new_head, require_bias
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.training.arguments import check_libraries, training_arguments
from hf_cifar.training.augmenting import augmentation
from hf_cifar.training.autotune import DTYPES, computing_as
from hf_cifar.training.averaging import WeightAverage
from hf_cifar.training.dataset import any_decodes, store_of
from hf_cifar.training.distillation import build_distillation
from hf_cifar.training.features import (
    FeatureStore,
    feature_store,
    features_suffice,
    has_feature_vectors,
)
from hf_cifar.training.losses import Loss, training_loss
from hf_cifar.training.probing import probe_head, probe_new_rows, probe_sample, why_not_probed
from hf_cifar.training.resumable import identity
from hf_cifar.training.sampling import SAMPLED, BalancedSampler
from hf_cifar.training.sharpness import SharpnessAware
from hf_cifar.training.trainer import ImageClassificationTrainer
from hf_cifar.training.unfreezing import GradualUnfreezing
from hf_cifar.transforms.preprocessing import Preprocessing

if TYPE_CHECKING:  # hf_cifar.plan imports this package
    from hf_cifar.plan import Plan

logger = logging.getLogger(__name__)
# --class_balance is suggested if the largest class has at least this many times the images of the smallest.
UNEQUAL = 5
# Values of --class_balance that change neither the loss nor the order of the images.
PLAIN = ("none", "post_hoc")


def build_trainer(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    splits: Splits,
    plan: Plan,
    trainer_class: type[ImageClassificationTrainer] = ImageClassificationTrainer,
    callbacks: Sequence[TrainerCallback] = (),
) -> ImageClassificationTrainer:
    """Build the Trainer of a planned run, on the pixels or features of both splits. Fit a new head first.

    The images of the splits are prepared unless `prepare_splits` has done so. callbacks: besides the run's
    own.

    Raises: UserError for an option whose package is missing, or which the model does not support.
    """
    config, train = plan.config, plan.config.train
    preprocessing = Preprocessing.from_image_processor(image_processor)
    if splits.validation.images is None:
        splits = prepare_splits(splits, preprocessing, config.data, plan.processes.device)
    num_workers = train.dataloader_num_workers
    if num_workers is None:
        decodes = any_decodes((splits.train, splits.validation))
        num_workers = default_num_workers(decodes=decodes)
    args = training_arguments(config, num_workers)
    check_libraries(args, model)
    stores: list[Any] = [
        train_store(splits.train, preprocessing, args, config),
        store_of(splits.validation, args),
    ]
    if trains_on_features(config, model, preprocessing):
        with computing_as(plan.setting, model.to(args.device)):
            stores = feature_stores(model, splits, stores, preprocessing, config)
    elif plan.checkpoint is None:
        fit_new_head(model, splits.train, stores[0], preprocessing, plan)
    distillation = build_distillation(model, splits.train, stores[0], preprocessing, args, plan)
    patience = train.early_stopping_patience
    return trainer_class(
        model=model,
        args=args,
        processing_class=image_processor,
        train_dataset=stores[0],
        eval_dataset=stores[1],
        preprocessing=preprocessing,
        augmentation=augmentation(config.augment),
        setting=plan.setting,
        averaging=WeightAverage(train.ema_decay),
        layer_decay=train.layer_decay,
        l1_decay=train.l1_decay,
        backbone_learning_rate=train.backbone_learning_rate,
        freeze_batch_norm=bool(train.freeze_batch_norm),
        unfreezing=GradualUnfreezing(train.unfreeze_epochs),
        sharpness=SharpnessAware(train.sam_rho),
        loss=build_loss(model, splits.train, train),
        distillation=distillation,
        sampler=build_sampler(splits.train, train),
        shrink_batch=train.auto_find_batch_size,
        identity=identity(splits) | distillation.identity,
        callbacks=[*([] if patience is None else [EarlyStoppingCallback(patience)]), *callbacks],
    )


def counts_of_classes(train: Split) -> Tensor:
    """Return the number of training images of each class [K]; a class without images, which an update may
    keep, counts as one."""
    return torch.from_numpy(class_counts(train.labels, len(train.id2label)).clip(min=1)).float()


def build_loss(model: PreTrainedModel, train: Split | Stream, config: TrainingConfig) -> Loss:
    """Return the loss of the options."""
    counts = counts_of_classes(train) if isinstance(train, Split) else None
    return training_loss(
        config.label_smoothing_factor,
        multi_label=is_multi_label(model),
        name=config.loss,
        balance=config.class_balance,
        counts=counts,
    )


def balanced_cross_entropy(
    model: PreTrainedModel, train: Split | Stream, config: TrainingConfig
) -> Loss:
    """Return cross-entropy without label smoothing, which fits a new head and ranks learning rates.

    If the run balances the classes, each counts the same, as in the metric that picks its best checkpoint.
    """
    balance: Literal["none", "weights"] = "none" if config.class_balance in PLAIN else "weights"
    plain = replace(config, label_smoothing_factor=0.0, loss="cross_entropy", class_balance=balance)
    return build_loss(model, train, plain)


def check_balance(splits: Splits, config: TrainingConfig, model: PreTrainedModel) -> None:
    """Suggest --class_balance if the largest class has far more images than the smallest.

    Raises: UserError for data that cannot be balanced by class, or post_hoc for a head without biases.
    """
    train = splits.train
    if splits.multi_label or isinstance(train, Stream):
        if config.class_balance != "none":
            kind = (
                "multi-label data"
                if splits.multi_label
                else "a stream, whose classes are not counted"
            )
            raise UserError(
                f"--class_balance {config.class_balance} is not for {kind}; leave it out"
            )
        return
    if config.class_balance == "post_hoc":
        require_bias(model)
    if config.class_balance != "none":
        return
    if advice := imbalance(train, config):
        logger.info("%s", advice)


def imbalance(train: Split, config: TrainingConfig) -> str | None:
    """Return the largest and the smallest class and what to do, or None if they are of similar size."""
    solver = " (without --head_solver lbfgs)" if config.head_solver == "lbfgs" else ""
    counts = class_counts(train.labels, len(train.id2label))
    small, large = int(counts.argmin()), int(counts.argmax())
    if counts[large] < UNEQUAL * counts[small]:
        return None
    return (
        f"train: class {train.id2label[large]!r} has {counts[large]:,} images, {train.id2label[small]!r} has "
        f"{counts[small]:,}; rare classes will often be missed; consider --class_balance "
        f"logit_adjustment{solver}, which makes all classes count equally"
    )


def build_sampler(train: Split | Stream, config: TrainingConfig) -> BalancedSampler | None:
    """Return the sampler of the options, or None for the Trainer's own."""
    if config.class_balance not in SAMPLED:
        return None
    assert isinstance(train, Split)  # see `check_balance`
    return BalancedSampler(train.labels, config.class_balance, config.seed)


def train_store(
    train: Split | Stream,
    preprocessing: Preprocessing,
    args: TrainingArguments,
    config: RunConfig,
) -> ShardStore | ResidentStore | PreparedStore:
    """Return the store of the training images."""
    if isinstance(train, Stream):
        return shard_store(train, preprocessing, args, config)
    return store_of(train, args, skips=config.data.on_bad_image == "skip")


def shard_store(
    train: Stream, preprocessing: Preprocessing, args: TrainingArguments, config: RunConfig
) -> ShardStore:
    """Return this process's part of a stream. Raises: UserError for options that rule it out."""
    refused = {
        "auto_find_batch_size": config.train.auto_find_batch_size,
        "dataloader_persistent_workers": args.dataloader_persistent_workers,
    }
    for name in refused:
        if refused[name]:
            raise UserError(f"--{name} cannot be combined with --streaming; leave one of them out")
    logger.info(
        "train: about %s images in %d shards, read on demand",
        f"{len(train):,}", train.rows.num_shards,
    )  # fmt: skip
    return ShardStore(
        train,
        preprocessing.stored(augmented=True),
        batch_size=args.train_batch_size,
        seed=args.seed,
        rank=args.process_index,
        num_processes=args.world_size,
    )


def trains_on_features(
    config: RunConfig, model: PreTrainedModel, preprocessing: Preprocessing
) -> bool:
    """Return True if only the head trains, on features that can be computed once.

    Raises: UserError if the run requires features but the options or the model rule them out.
    """
    changed = config.train.loss != "cross_entropy" or config.train.class_balance not in PLAIN
    if config.train.head_solver == "lbfgs" and changed:
        raise UserError(
            "--head_solver lbfgs minimises plain cross-entropy; leave out --loss and --class_balance, other "
            "than post_hoc, or --head_solver"
        )
    mixed = config.augment.mixup_alpha or config.augment.cutmix_alpha
    if config.computes_features and not mixed and features_suffice(model, preprocessing):
        return True
    if config.train.head_solver == "lbfgs":
        raise UserError(
            "--head_solver lbfgs needs --freeze backbone, --feature_views of 1 or more, a model whose head "
            "is one linear layer, and no mixup, cutmix or --streaming"
        )
    return False


def feature_stores(
    model: PreTrainedModel,
    splits: Splits,
    stores: list[Any],
    preprocessing: Preprocessing,
    config: RunConfig,
) -> list[FeatureStore]:
    """Return the features of train, in all views, and of validation."""
    assert isinstance(splits.train, Split)  # see `trains_on_features`
    return [
        features_of(model, split, store, preprocessing, config, views=views, decodes=store.decodes)
        for split, store, views in zip(
            (splits.train, splits.validation), stores, (config.train.feature_views, 1), strict=True
        )
    ]


def features_of(
    model: PreTrainedModel,
    split: Split,
    store: Any,
    preprocessing: Preprocessing,
    config: RunConfig,
    *,
    views: int = 1,
    decodes: bool,
) -> FeatureStore:
    """Return the features of a split, in some views. decodes: the store decodes images when it is read."""
    return feature_store(
        model,
        split,
        store,
        preprocessing,
        augmentation(config.augment),
        views=views,
        seed=config.train.seed,
        batch_size=config.train.per_device_eval_batch_size,
        num_workers=default_num_workers(decodes=decodes),
        dtype=DTYPES.get(config.train.precision, torch.float32),
    )


def fit_new_head(
    model: PreTrainedModel,
    train: Split | Stream,
    store: Any,
    preprocessing: Preprocessing,
    plan: Plan,
) -> None:
    """Fit the new head of a pretrained model, unless the options say not to, or it cannot be fitted."""
    config, options = plan.config, plan.config.train
    grown = bool(getattr(model, "new_rows", []))
    if not options.probe_images or config.model.freeze == "backbone":
        return
    if not (grown or has_new_head(model)):
        return
    sample = probe_sample(train, options.probe_images, options.seed)
    reason = why_not_probed(model, sample)
    if reason is None and not has_feature_vectors(model.to(plan.processes.device), preprocessing):
        reason = "its input is not one feature vector per image"
    if reason is not None:
        logger.info("head: not fitted before training, because %s", reason)
        return
    assert isinstance(train, Split) and isinstance(sample, Split)
    rows = np.flatnonzero(np.isin(train.row_ids, sample.row_ids)).tolist()
    with computing_as(plan.setting, model):
        features = features_of(
            model, sample, Subset(store, rows), preprocessing, config, decodes=store.decodes
        )
    probe = probe_new_rows if grown else probe_head
    probe(model, features, options.seed, balanced_cross_entropy(model, train, options))
