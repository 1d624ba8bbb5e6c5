"""Rerun a finished run, and compare the two: versions, data, weights, metrics."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from hf_cifar.config.metrics import shown
from hf_cifar.config.objects import require_object
from hf_cifar.config.run import RunConfig
from hf_cifar.data.split import Split, trained_rows
from hf_cifar.data.splits import DataSource, prepare_splits
from hf_cifar.errors import UserError
from hf_cifar.evaluation.predictions import Predictions, saved_splits
from hf_cifar.evaluation.tables import render_number
from hf_cifar.finetune import finetune_classifier
from hf_cifar.models.build import load_classifier
from hf_cifar.runs.environment import environment
from hf_cifar.runs.folder import RunFolder, write_json
from hf_cifar.runs.processes import is_main_process, start_processes
from hf_cifar.text import render_table
from hf_cifar.training.checkpoints import file_hash
from hf_cifar.training.resumable import pixel_hashes
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

# Recorded conditions, besides versions and commit, on which the result of a run may depend.
CONDITIONS = ("device", "processes", "num_threads", "split_hash", "pixel_hashes")


def reproduce_run(
    folder: str | Path, output_dir: str | Path, *, other_data: bool = False
) -> dict[str, Any]:
    """Rerun the finished run in `folder` in `output_dir`, and compare the two.

    It computes as the original did: in the saved setting, on the CPU if that was its device, with as many
    threads. Neither pixels nor features come from the disk cache. It reports to no tracker and pushes
    nothing. other_data: continue even if the data has changed. Returns `compare_reproduction` of both, also
    in output_dir/reproduction.json.

    Raises: UserError before training if `folder` holds no finished run, the data has changed, or the number
    of processes differs.
    """
    folder = Path(folder)
    RunFolder(folder).require_finished()
    facts = RunFolder(folder).facts()
    if "combined" in facts:
        raise UserError(
            f"{folder} combines runs; reproduce those, and combine them again with hf-cifar combine"
        )
    config = config_of_rerun(folder, Path(output_dir), facts)
    require_object(config.data.dataset_name, "data set")
    require_object(config.model.model_name_or_path, "model")
    source = DataSource(config.data)
    with original_conditions(facts):
        num_processes = start_processes(config).count
        if num_processes != facts["processes"]:
            raise UserError(
                f"{folder} was trained by {facts['processes']} process(es), and {num_processes} are running; "
                f"start {facts['processes']} with accelerate launch"
            )
        if not other_data:
            check_data(source, folder, facts)
        for name, (original, now) in changes(facts["environment"], environment()).items():
            logger.info("%s: original %s, now %s", name, original, now)
        again = finetune_classifier(config, source).output_dir
    comparison = compare_reproduction(folder, again)
    if is_main_process():
        write_json(RunFolder(again).reproduction_path, comparison)
    return comparison


def config_of_rerun(folder: Path, output_dir: Path, facts: dict[str, Any]) -> RunConfig:
    """Return the saved options of a run for another folder: only those that decide what it computes."""
    tokens = ["--config", str(RunFolder(folder).config_path), "--output_dir", str(output_dir)]
    tokens += ["--report_to", "none", "--push_to_hub", "false"]
    tokens += ["--do_predict", str("test" in saved_splits(folder)).lower()]
    if facts["device"].startswith("CPU"):
        tokens += ["--use_cpu", "true"]
    return RunConfig.parse(tokens, "hf-cifar reproduce")


@contextlib.contextmanager
def original_conditions(facts: dict[str, Any]) -> Iterator[None]:
    """Compute with as many threads as the run did, and with an empty disk cache."""
    num_threads, cache = torch.get_num_threads(), os.environ.get("HF_CIFAR_CACHE")
    with tempfile.TemporaryDirectory() as empty:
        torch.set_num_threads(facts.get("num_threads", num_threads))
        os.environ["HF_CIFAR_CACHE"] = empty
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)
            os.environ.pop("HF_CIFAR_CACHE")
            if cache is not None:
                os.environ["HF_CIFAR_CACHE"] = cache


def check_data(source: DataSource, folder: Path, facts: dict[str, Any]) -> None:
    """Raises: UserError if rows, labels or pixels differ from those of the run in `folder`."""
    name, advice = (
        source.config.dataset_name,
        ("restore the data, or pass --other_data to see the effect of the change"),
    )
    _, image_processor = load_classifier(str(folder), trust_remote_code=True)
    preprocessing = Preprocessing.from_image_processor(image_processor)
    if source.splits.hash != facts["split_hash"]:
        raise UserError(
            f"rows or labels of {name} have changed: split hash {source.splits.hash[:16]}, "
            f"originally {facts['split_hash'][:16]}; {advice}"
        )
    splits = prepare_splits(source.splits, preprocessing, source.config)
    train = splits.train
    train = trained_rows(train, facts) if isinstance(train, Split) else train
    now = pixel_hashes((train, splits.validation))
    for split, original in facts.get("pixel_hashes", {}).items():
        if now.get(split, original) != original:
            raise UserError(
                f"the {split} images of {name} have changed: pixel hash {now[split][:16]}, originally "
                f"{original[:16]}; {advice}"
            )


def compare_reproduction(folder: Path, again: Path) -> dict[str, Any]:
    """Return the differences between two finished runs of the same options, as plain values.

    `changed`: [original, now] of each version, condition and hash that differs. `weights`: see
    `compare_weights`. `predictions`: by split, see `compare_logits`. `metrics`: by split, [original, now] of
    every headline metric.
    """
    runs = [RunFolder(path) for path in (folder, again)]
    facts, metrics = [run.facts() for run in runs], [run.metrics() for run in runs]
    splits = [split for split in saved_splits(folder) if split in saved_splits(again)]
    conditions = [{name: each.get(name) for name in CONDITIONS} for each in facts]
    return {
        "run": str(folder),
        "reproduction": str(again),
        "changed": changes(*(each["environment"] for each in facts)) | changes(*conditions),
        "weights": compare_weights(*(run.weights_path for run in runs)),
        "predictions": {
            split: compare_logits(*(Predictions.load(path, split) for path in (folder, again)))
            for split in splits
        },
        "metrics": {
            split: {
                name: [each[split].get(name) for each in metrics]
                for name in ("num_images", *shown("headline", metrics[0][split]))
            }
            for split in splits
        },
    }


def changes(original: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Return [original, now] of the values that differ, by name; None where one of them has no value."""
    return {
        name: [original.get(name), now.get(name)]
        for name in {**original, **now}
        if original.get(name) != now.get(name)
    }


def compare_weights(original: Path, now: Path) -> dict[str, Any]:
    """Compare two safetensors files: identical to the bit, or how many tensors differ, and by how much.

    `unmatched` counts tensors that only one file has, or with another shape; `largest_difference` is over the
    others.
    Raises: UserError for a file that cannot be read.
    """
    hashes = [file_hash(path) for path in (original, now)]
    differing, unmatched, largest = 0, 0, 0.0
    try:
        with safe_open(original, "pt") as first, safe_open(now, "pt") as second:
            names = set(first.keys()) | set(second.keys())
            if hashes[0] != hashes[1]:
                common = set(first.keys()) & set(second.keys())
                unmatched = len(names) - len(common)
                for name in sorted(common):
                    a, b = first.get_tensor(name), second.get_tensor(name)
                    if a.shape != b.shape:
                        unmatched += 1
                    elif not torch.equal(_bits(a), _bits(b)):
                        differing += 1
                        largest = max(largest, (a.double() - b.double()).abs().max().item())
    except SafetensorError as error:
        raise UserError(
            f"{original} or {now} is damaged ({error}); restore it to compare the weights"
        ) from None
    return {
        "identical": differing == unmatched == 0,
        "sha256": hashes,
        "num_tensors": len(names),
        "differing": differing,
        "unmatched": unmatched,
        "largest_difference": largest,
    }


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1).view(torch.uint8)


def compare_logits(original: Predictions, now: Predictions) -> dict[str, Any]:
    """Compare two predictions of a split: identical to the bit, or how far the logits are apart, and how many
    images have another predicted label."""
    same_images = (
        np.array_equal(original.row_ids, now.row_ids)
        and np.array_equal(original.labels, now.labels)
        and original.logits.shape == now.logits.shape
    )
    if not same_images:
        return {"identical": False, "same_images": False}
    changed = (original.predicted != now.predicted).reshape(len(original.row_ids), -1).any(axis=1)
    return {
        "identical": bool(np.array_equal(original.logits, now.logits)),
        "same_images": True,
        "num_images": len(original.row_ids),
        "changed_labels": int(changed.sum()),
        "largest_difference": float(np.abs(original.logits - now.logits).max()),
    }


def render_reproduction(comparison: dict[str, Any]) -> str:
    """Render the differences as text."""
    parts = [f"{comparison['run']}, rerun in {comparison['reproduction']}"]
    if comparison["changed"]:
        rows = [
            [name, *(_short(value) for value in values)]
            for name, values in comparison["changed"].items()
        ]
        parts.append(render_table(["changed", "original", "now"], rows))
    else:
        parts.append("versions, commit, device, threads and data: the same")
    header, columns = [""], []
    for split, metrics in comparison["metrics"].items():
        header += [f"{split}, original", "now"]
        columns.append(metrics)
    rows = [
        [name, *(render_number(value) for metrics in columns for value in metrics[name])]
        for name in columns[0]
    ]
    parts.append(render_table(header, rows))
    lines = [
        f"{split} predictions: {_render_logits(found)}"
        for split, found in comparison["predictions"].items()
    ]
    lines.append(f"weights: {_render_weights(comparison['weights'])}")
    return "\n\n".join([*parts, "\n".join(lines)])


def _render_logits(found: dict[str, Any]) -> str:
    if not found["same_images"]:
        return "different images or classes"
    if found["identical"]:
        return f"bit-identical, {found['num_images']:,} images"
    return (
        f"logits differ by up to {found['largest_difference']:.2g}; {found['changed_labels']:,} of "
        f"{found['num_images']:,} images have another predicted label"
    )


def _render_weights(found: dict[str, Any]) -> str:
    if found["identical"]:
        return f"bit-identical, {found['num_tensors']} tensors, SHA-256 {found['sha256'][1]}"
    unmatched = found["unmatched"]
    rest = f", {unmatched} are in one run only or of another shape" if unmatched else ""
    return (
        f"{found['differing']} of {found['num_tensors']} tensors differ, by up to "
        f"{found['largest_difference']:.2g}{rest}"
    )


def _short(value: Any) -> str:
    """Shorten a value for a table: the beginning of a hash, or of each of multiple hashes."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items()) or "-"
    return "-" if value is None else str(value)[:40]
