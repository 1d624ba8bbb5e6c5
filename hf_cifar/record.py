"""The facts of a run, as run.json holds them."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from hf_cifar.config.run import RunConfig
from hf_cifar.data.columns import class_counts
from hf_cifar.data.split import Split
from hf_cifar.data.splits import Splits
from hf_cifar.hub.origin import find_origin
from hf_cifar.hub.push import Target
from hf_cifar.models.blocks import describe_trainable
from hf_cifar.runs.environment import environment
from hf_cifar.training.resumable import pixel_hashes
from hf_cifar.training.trainer import ImageClassificationTrainer


def known_facts(
    splits: Splits, config: RunConfig, leakage: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What is known of a run before it trains, as plain values: whose model and data, the split, versions."""
    model, data = config.model, config.data
    return {
        "repo_id": Target.of_run(config.train).repo_id,  # the folder may get another name
        "model": asdict(find_origin(model.model_name_or_path, "model", model.model_revision)),
        "dataset": asdict(find_origin(data.dataset_name, "dataset")),
        "split_hash": splits.hash,
        "source_splits": {
            "train": splits.train.source_split,
            "validation": splits.validation.source_split,
        },
        "num_train": len(splits.train),
        "num_validation": len(splits.validation),
        "skipped_rows": {
            split.name: split.skipped.tolist()
            for split in (splits.train, splits.validation)
            if isinstance(split, Split) and len(split.skipped)
        },
        "leakage": leakage,
        "environment": environment(),
    }


def run_facts(
    trainer: ImageClassificationTrainer,
    splits: Splits,
    temperature: float,
    config: RunConfig,
    leakage: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What happened in a run, as plain values: data, work, time, machine and versions."""
    state, device = trainer.state, trainer.args.device
    logged = {name: value for log in state.log_history for name, value in log.items()}
    seconds = logged["train_runtime"]
    return known_facts(splits, config, leakage) | {
        "label_counts": {
            split.name: {
                name: int(count)
                for name, count in zip(
                    split.id2label.values(),
                    class_counts(split.labels, len(split.id2label)),
                    strict=True,
                )
            }
            for split in (splits.train, splits.validation)
            if isinstance(split, Split)  # nobody has counted a stream's
        },
        "pixel_hashes": pixel_hashes(splits, config),
        "trainable": describe_trainable(trainer.model),
        "steps": state.global_step,
        "epochs": state.epoch,
        "best_checkpoint_step": state.best_global_step,
        "temperature": temperature,
        "train_seconds": seconds,
        "train_images_per_second": round(len(splits.train) * (state.epoch or 0) / seconds, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": trainer.args.world_size,
        "num_threads": torch.get_num_threads(),  # sums on a CPU depend on it
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})",
        "energy": logged.get("energy"),  # None where nothing measured it
        "history": plain_history(state.log_history),
    }


def plain_history(log_history: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """The Trainer's log records as JSON can hold them: None for what is no finite number, as the gradient
    norm of a step that overflows in fp16."""
    return [
        {name: value if math.isfinite(value) else None for name, value in record.items()}
        for record in log_history
        if "energy" not in record
    ]
