"""Training options that are looked at before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_cifar.config.augmentation import AugmentConfig
from hf_cifar.config.data import DataConfig
from hf_cifar.config.fields import option
from hf_cifar.config.model import ModelConfig

LIGHT_CONFIGS = (DataConfig, AugmentConfig, ModelConfig)


@dataclass
class FinetuneOptions:
    """Training options that the Trainer does not have, or that are looked at before it is imported."""

    output_dir: str | None = option(
        "outputs/finetuned", "Folder of the run: model, figures, checkpoints."
    )
    resume_from_checkpoint: str | None = option(
        None, "Go on from a checkpoint: last, or a checkpoint's folder."
    )
    seeds: int = option(
        1,
        "Runs with seeds seed, seed + 1, ..., in OUTPUT_DIR/seed-SEED; their figures' mean and spread in "
        "OUTPUT_DIR/seeds.json.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto",
        "Number format of training: auto times a few steps of each, in each memory format and attention, and "
        "keeps the fastest that is sound.",
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = option(
        "auto", "Memory format of weights and images; auto goes with --precision auto."
    )
    attention: Literal["auto", "fused", "eager"] = option(
        "auto",
        "As the model comes, which is one kernel where there is one, or eager: the products of matrices that "
        "it stands for; auto goes with --precision auto.",
    )
    feature_views: int = option(
        1,
        "With --freeze backbone: compute the head's inputs once, of this many views of each image, and "
        "train on them; 0 runs the backbone in every step.",
    )
    head_solver: Literal["optimizer", "lbfgs"] = option(
        "optimizer",
        "With --freeze backbone: train the head in epochs, or solve for it exactly, with the penalty that "
        "does best on validation.",
    )
    layer_decay: float = option(
        1.0, "Share of the learning rate that each block has of the block behind it."
    )
    ema_decay: float = option(
        0.0,
        "Evaluate and save an average of the weights that keeps this share of itself in each step (less in "
        "the first ones), as 0.999; 0 for none.",
    )
    early_stopping_patience: int | None = option(
        None, "Stop after this many evaluations without a better validation accuracy."
    )
    calibrate: bool = option(
        True,
        "At the end, fit a temperature on validation and fold it into the head: the same labels, with "
        "probabilities that mean what they say. Of multi-label data, a threshold for each class instead.",
    )
    check_leakage: bool = option(
        False,
        "Before training, look for test images that are in train or validation too, exactly or nearly, and "
        "name them. Compares pixels alone, and nothing of test reaches the training.",
    )
