"""The facts of a run, as stored in run.json."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from hf_cifar.audit.leakage import find_leakage
from hf_cifar.config.run import RunConfig
from hf_cifar.data.labels import class_counts
from hf_cifar.data.split import Split
from hf_cifar.data.splits import DataSource, Splits
from hf_cifar.data.streams import Stream
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.hub.origin import find_origin, origin_of_model
from hf_cifar.hub.push import Target
from hf_cifar.runs.environment import environment
from hf_cifar.training.resumable import pixel_hashes
from hf_cifar.training.teacher import facts_of_teacher
from hf_cifar.training.trainer import ImageClassificationTrainer


@dataclass(frozen=True)
class Fitted:
    """The cost of training: seconds, and energy as in `measured_energy`, None if unknown."""

    seconds: float
    energy: dict[str, float | str] | None


def known_facts(
    source: DataSource,
    splits: Splits,
    test: Split | None,
    config: RunConfig,
    race: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the facts of a run known before training, as plain values: model, data, split, versions.

    splits: of the source, with their images. test: compared with train, with --check_leakage. race: of
    learning rates, see `Plan`.
    """
    model, data = config.model, config.data
    value_range = source.value_range
    return {
        "repo_id": Target.of_run(config.train).repo_id,  # the folder may be renamed
        "model": asdict(origin_of_model(model)),
        "dataset": asdict(find_origin(str(data.dataset_name), "dataset")),
        "source": source.facts,
        "split_hash": source.splits.hash,  # unreadable images included
        "source_splits": {
            "train": splits.train.source_split,
            "validation": splits.validation.source_split,
        },
        "num_train": len(splits.train),
        "num_validation": len(splits.validation),
        "skipped_rows": skipped_rows(splits),
        "doubted_rows": doubted_rows(splits.train),
        "teacher": facts_of_teacher(config, source.splits.hash),
        "value_range": None if value_range is None else astuple(value_range),
        "race": race,
        "leakage": find_leakage(splits, test) if test and config.train.check_leakage else None,
        "environment": environment(),
    }


def skipped_rows(splits: Splits) -> dict[str, list[int]]:
    """Return the row ids that --on_bad_image skip has left out so far, by split."""
    found: dict[str, list[int]] = {}
    for split in (splits.train, splits.validation):
        if isinstance(split, Split) and split.images is not None:
            during = split.row_ids[list(split.images.faults)]
            rows = sorted({*split.skipped.tolist(), *during.tolist()})
            found |= {split.name: rows} if rows else {}
    return found


def doubted_rows(train: Split | Stream) -> dict[str, Any] | None:
    """Return the training rows that --clean_labels left out, with their labels and suggested labels, and the
    count of each suggested change; None without --clean_labels."""
    if not isinstance(train, Split) or train.doubted is None:
        return None
    ids, given, suggested = train.doubted.T.tolist()
    labels = [[train.id2label[label] for label in each] for each in (given, suggested)]
    changes = Counter(zip(*labels, strict=True)).most_common()
    return {
        "num_rows": len(ids),
        "share": len(ids) / (len(ids) + len(train)),
        "changes": [
            {"label": label, "suggested": other, "num_rows": count}
            for (label, other), count in changes
        ],
        "row_ids": ids,
        "labels": labels[0],
        "suggested": labels[1],
    }


def run_facts(
    trainer: ImageClassificationTrainer,
    splits: Splits,
    fitted: Fitted,
    validation: Predictions,
) -> dict[str, Any]:
    """Return the facts of a finished run, as plain values: data, work, time and machine."""
    state, device, seconds = trainer.state, trainer.args.device, fitted.seconds
    return {
        "skipped_rows": skipped_rows(splits),
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
            if isinstance(split, Split)  # unknown for a stream
        },
        "pixel_hashes": pixel_hashes((splits.train, splits.validation)),
        "trainable": trainer.trainable,
        "steps": state.global_step,
        "epochs": state.epoch,
        "best_checkpoint_step": state.best_global_step,
        "temperature": validation.temperature,
        "post_hoc": validation.post_hoc,
        "train_seconds": seconds,
        "train_images_per_second": round(len(splits.train) * (state.epoch or 0) / seconds, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": trainer.args.world_size,
        "num_threads": torch.get_num_threads(),  # rounding on a CPU depends on it
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU ({os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()})",
        "energy": fitted.energy,
        "history": plain_history(state.log_history),
    }


def plain_history(log_history: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """Return the Trainer's log records for JSON, with None instead of NaN and infinity, such as the gradient
    norm of a step that overflows in fp16."""
    return [
        {name: value if math.isfinite(value) else None for name, value in record.items()}
        for record in log_history
    ]
