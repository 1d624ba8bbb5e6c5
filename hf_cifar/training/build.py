"""Construction of a run's Trainer, with its stores or features and its augmentation."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    BaseImageProcessor,
    EarlyStoppingCallback,
    PreTrainedModel,
    TrainingArguments,
)

from hf_cifar.config.augmentation import AugmentConfig
from hf_cifar.config.run import RunConfig
from hf_cifar.data.split import Split
from hf_cifar.data.splits import Splits, prepare_splits
from hf_cifar.data.store import (
    CPU,
    PreparedStore,
    ResidentStore,
    ShardStore,
    build_store,
    default_num_workers,
)
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.training.arguments import check_libraries, training_arguments
from hf_cifar.training.autotune import DTYPES, computing_as
from hf_cifar.training.averaging import WeightAverage
from hf_cifar.training.features import FeatureStore, feature_store, features_suffice
from hf_cifar.training.losses import evaluation_loss, training_loss
from hf_cifar.training.resumable import identity
from hf_cifar.training.trainer import ImageClassificationTrainer
from hf_cifar.transforms.augmentation import Augmentation
from hf_cifar.transforms.policies import Policy
from hf_cifar.transforms.preprocessing import Preprocessing
from hf_cifar.transforms.views import RandomView

if TYPE_CHECKING:  # hf_cifar.plan imports this package
    from hf_cifar.plan import Plan

logger = logging.getLogger(__name__)


def build_trainer(
    model: PreTrainedModel, image_processor: BaseImageProcessor, splits: Splits, plan: Plan
) -> ImageClassificationTrainer:
    """Build the Trainer of a planned run, on the pixels or features of both splits.

    The images of the splits are prepared unless `prepare_splits` has done so.

    Raises: UserError for an option whose package is missing, or which the model does not support.
    """
    config, train = plan.config, plan.config.train
    preprocessing = Preprocessing.from_image_processor(image_processor)
    if splits.validation.images is None:
        splits = prepare_splits(splits, preprocessing, config.data, plan.processes.device)
    num_workers = train.dataloader_num_workers
    if num_workers is None:
        num_workers = default_num_workers(decodes=decodes_while_training(splits))
    args = training_arguments(config, num_workers)
    check_libraries(args, model)
    device = args.device if num_workers == 0 else CPU  # a worker process must not touch a GPU
    stores: list[Any] = [
        train_store(splits.train, preprocessing, args, config, device),
        build_store(splits.validation, device=device),
    ]
    if trains_on_features(config, model, preprocessing):
        with computing_as(plan.setting, model.to(args.device)):
            stores = feature_stores(model, splits, stores, preprocessing, config)
    multi_label, patience = is_multi_label(model), train.early_stopping_patience
    return ImageClassificationTrainer(
        model=model,
        args=args,
        processing_class=image_processor,
        train_dataset=stores[0],
        eval_dataset=stores[1],
        loss=training_loss(train, multi_label=multi_label),
        evaluation_loss=evaluation_loss(multi_label=multi_label),
        preprocessing=preprocessing,
        augmentation=augmentation(config.augment),
        setting=plan.setting,
        averaging=WeightAverage(train.ema_decay),
        layer_decay=train.layer_decay,
        shrink_batch=train.auto_find_batch_size,
        identity=identity(splits, plan.processes.count),
        callbacks=[] if patience is None else [EarlyStoppingCallback(patience)],
    )


def decodes_while_training(splits: Splits) -> bool:
    """Return True if images are decoded while the model trains or is evaluated."""
    return any(
        isinstance(split, Stream) or (split.images is not None and split.images.decodes)
        for split in (splits.train, splits.validation)
    )


def train_store(
    train: Split | Stream,
    preprocessing: Preprocessing,
    args: TrainingArguments,
    config: RunConfig,
    device: torch.device,
) -> ShardStore | ResidentStore | PreparedStore:
    """Return the store of the training images."""
    if isinstance(train, Stream):
        return shard_store(train, preprocessing, args, config)
    return build_store(train, device=device, skips=config.data.on_bad_image == "skip")


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
    if config.train.head_solver == "lbfgs" and is_multi_label(model):
        raise UserError(
            "--head_solver lbfgs is for one label per image, and this data is multi-label; leave it out"
        )
    wanted = config.model.freeze == "backbone" and config.train.feature_views > 0
    wanted = wanted and not config.data.streaming
    mixed = config.augment.mixup_alpha or config.augment.cutmix_alpha
    if wanted and not mixed and features_suffice(model, preprocessing):
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
    options = {
        "preprocessing": preprocessing,
        "augmentation": augmentation(config.augment),
        "seed": config.train.seed,
        "batch_size": config.train.per_device_eval_batch_size,
        "dtype": DTYPES.get(config.train.precision, torch.float32),
    }
    return [
        feature_store(
            model,
            split,
            store,
            views=views,
            num_workers=default_num_workers(decodes=store.decodes),
            **options,
        )
        for split, store, views in zip(
            (splits.train, splits.validation), stores, (config.train.feature_views, 1), strict=True
        )
    ]


def augmentation(options: AugmentConfig) -> Augmentation:
    """Return the random transform of training batches defined by the options."""
    view = RandomView(
        padding=options.crop_padding,
        min_area=options.crop_scale,
        max_ratio=options.crop_ratio,
        flip=options.flip,
        rotation=options.rotation,
        shear=options.shear,
        zoom=options.zoom,
    )
    policies = {
        "none": lambda: None,
        "trivial_augment": Policy.trivial_augment,
        "rand_augment": lambda: Policy.rand_augment(
            options.rand_augment_ops, options.rand_augment_magnitude / 30
        ),
    }
    names = {each.name for each in dataclasses.fields(Augmentation)} - {"view", "policy"}
    of_one_name = {name: getattr(options, name) for name in names}
    return Augmentation(view=view, policy=policies[options.auto_augment](), **of_one_name)
