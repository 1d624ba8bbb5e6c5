"""Make a run again from what it left, and tell what differs: versions, data, weights, figures."""

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
from hf_cifar.config.run import RunConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.evaluation.predictions import Predictions, saved_splits
from hf_cifar.evaluation.tables import render_number
from hf_cifar.finetune import finetune_classifier
from hf_cifar.runs.environment import environment
from hf_cifar.runs.folder import RunFolder, write_json
from hf_cifar.runs.processes import is_main_process, start_processes
from hf_cifar.text import render_table
from hf_cifar.training.checkpoints import file_hash
from hf_cifar.training.resumable import pixel_hashes

logger = logging.getLogger(__name__)

# Of what a run records beside versions and commit, what its result may depend on.
CONDITIONS = ("device", "processes", "num_threads", "split_hash", "pixel_hashes")


def reproduce_run(
    folder: str | Path, output_dir: str | Path, *, other_data: bool = False
) -> dict[str, Any]:
    """Make a finished run again in `output_dir`, from what it left in `folder`, and compare the two.

    It computes as then: in the saved setting, on the CPU if the run did, with as many threads. Neither pixels
    nor features come from the disk cache. It reports to no tracker and pushes nothing. other_data: go on if
    the data has changed. Returns `compare_reproduction` of both, also in output_dir/reproduction.json.

    Raises: UserError before training if `folder` holds no finished run, the data has changed, or there are
    more or fewer processes than then.
    """
    folder = Path(folder)
    RunFolder(folder).require_finished()
    facts = RunFolder(folder).facts()
    config = config_of_rerun(folder, Path(output_dir), facts)
    source = DataSource(config.data)
    with as_then(facts):
        num_processes = start_processes(config).count
        if num_processes != facts["processes"]:
            raise UserError(
                f"{folder} was trained by {facts['processes']} process(es), here are {num_processes}; start "
                "as many with accelerate launch"
            )
        if not other_data:
            check_data(source, config, facts)
        for name, (then, now) in changes(facts["environment"], environment()).items():
            logger.info("%s: %s then, %s now", name, then, now)
        again = finetune_classifier(config, source).output_dir
    comparison = compare_reproduction(folder, again)
    if is_main_process():
        write_json(RunFolder(again).reproduction_path, comparison)
    return comparison


def config_of_rerun(folder: Path, output_dir: Path, facts: dict[str, Any]) -> RunConfig:
    """The options that a run saved, for another folder: all that says what it computes, and no more."""
    tokens = ["--config", str(RunFolder(folder).config_path), "--output_dir", str(output_dir)]
    tokens += ["--report_to", "none", "--push_to_hub", "false"]
    tokens += ["--do_predict", str("test" in saved_splits(folder)).lower()]
    if facts["device"].startswith("CPU"):
        tokens += ["--use_cpu", "true"]
    return RunConfig.parse(tokens, "hf-cifar reproduce")


@contextlib.contextmanager
def as_then(facts: dict[str, Any]) -> Iterator[None]:
    """As many threads as the run had, and a disk cache without what it kept there."""
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


def check_data(source: DataSource, config: RunConfig, facts: dict[str, Any]) -> None:
    """Raises: UserError if rows, labels or pixels are not those of the run."""
    splits = source.splits
    advice = "restore the data, or pass --other_data to see what the change does"
    if splits.hash != facts["split_hash"]:
        raise UserError(
            f"{config.data.dataset_name} has other rows or labels than then: split hash {splits.hash[:16]}, "
            f"then {facts['split_hash'][:16]}; {advice}"
        )
    now = pixel_hashes(splits, config.data.pixel_store)
    for split, then in facts.get("pixel_hashes", {}).items():
        if now.get(split, then) != then:
            raise UserError(
                f"the {split} images of {config.data.dataset_name} are not those of then: pixel hash "
                f"{now[split][:16]}, then {then[:16]}; {advice}"
            )


def compare_reproduction(folder: Path, again: Path) -> dict[str, Any]:
    """What differs between two finished runs of the same options, as plain values.

    `changed`: [then, now] of each version, condition, and hash that differs. `weights`: see
    `compare_weights`. `predictions`: by split, see `compare_logits`. `figures`: by split, [then, now] of
    every headline figure.
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
        "figures": {
            split: {
                name: [figures[split].get(name) for figures in metrics]
                for name in ("num_images", *shown("headline", metrics[0][split]))
            }
            for split in splits
        },
    }


def changes(then: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """[then, now] of what differs by name; None for what one of them lacks."""
    return {
        name: [then.get(name), now.get(name)]
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    }


def compare_weights(then: Path, now: Path) -> dict[str, Any]:
    """Whether two safetensors files hold the same bits, else how many tensors differ, and how far.

    `unlike` counts tensors that one file lacks, or of another shape; `largest_difference` is over the others.
    Raises: UserError for a file that cannot be read.
    """
    hashes = [file_hash(path) for path in (then, now)]
    differing, unlike, largest = 0, 0, 0.0
    try:
        with safe_open(then, "pt") as first, safe_open(now, "pt") as second:
            names = set(first.keys()) | set(second.keys())
            if hashes[0] != hashes[1]:
                common = set(first.keys()) & set(second.keys())
                unlike = len(names) - len(common)
                for name in sorted(common):
                    a, b = first.get_tensor(name), second.get_tensor(name)
                    if a.shape != b.shape:
                        unlike += 1
                    elif not torch.equal(_bits(a), _bits(b)):
                        differing += 1
                        largest = max(largest, (a.double() - b.double()).abs().max().item())
    except SafetensorError as error:
        raise UserError(f"{then} or {now} is damaged ({error}); nothing can be compared") from None
    return {
        "identical": differing == unlike == 0,
        "sha256": hashes,
        "num_tensors": len(names),
        "differing": differing,
        "unlike": unlike,
        "largest_difference": largest,
    }


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1).view(torch.uint8)


def compare_logits(then: Predictions, now: Predictions) -> dict[str, Any]:
    """Whether two files of predictions hold the same bits, else how far the logits are apart, and how many
    images were told otherwise."""
    same_images = (
        np.array_equal(then.row_ids, now.row_ids)
        and np.array_equal(then.labels, now.labels)
        and then.logits.shape == now.logits.shape
    )
    if not same_images:
        return {"identical": False, "same_images": False}
    told = (then.answers != now.answers).reshape(len(then.row_ids), -1).any(axis=1)
    return {
        "identical": bool(np.array_equal(then.logits, now.logits)),
        "same_images": True,
        "num_images": len(then.row_ids),
        "told_otherwise": int(told.sum()),
        "largest_difference": float(np.abs(then.logits - now.logits).max()),
    }


def render_reproduction(comparison: dict[str, Any]) -> str:
    """What differs, as people read it."""
    parts = [f"{comparison['run']}, and again in {comparison['reproduction']}"]
    if comparison["changed"]:
        rows = [
            [name, *(_short(value) for value in values)]
            for name, values in comparison["changed"].items()
        ]
        parts.append(render_table(["changed", "then", "now"], rows))
    else:
        parts.append("versions, commit, device, threads and data: the same")
    header, columns = [""], []
    for split, figures in comparison["figures"].items():
        header += [f"{split} then", "now"]
        columns.append(figures)
    rows = [
        [name, *(render_number(value) for figures in columns for value in figures[name])]
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
        return "of other images or classes"
    if found["identical"]:
        return f"bit-identical, {found['num_images']:,} images"
    return (
        f"logits differ by up to {found['largest_difference']:.2g}; {found['told_otherwise']:,} of "
        f"{found['num_images']:,} images are told otherwise"
    )


def _render_weights(found: dict[str, Any]) -> str:
    if found["identical"]:
        return f"bit-identical, {found['num_tensors']} tensors, SHA-256 {found['sha256'][1]}"
    unlike = f", {found['unlike']} are in one alone or of another shape" if found["unlike"] else ""
    return (
        f"{found['differing']} of {found['num_tensors']} tensors differ, by up to "
        f"{found['largest_difference']:.2g}{unlike}"
    )


def _short(value: Any) -> str:
    """A value for a table; of a hash, or of several, the beginning."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items()) or "-"
    return "-" if value is None else str(value)[:40]
