"""The files of a run's folder: their names, reading and writing them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from hf_cifar.config.command_line import parse
from hf_cifar.config.data import DataConfig
from hf_cifar.config.fields import field_names
from hf_cifar.config.recipes import yaml_tokens
from hf_cifar.errors import UserError

CONFIG_FILE = "config.yaml"  # the resolved options in a run's folder
RUN_FILE = "run.json"  # what happened in it
METRICS_FILE = "metrics.json"  # the figures of its splits
WEIGHTS_FILE = "model.safetensors"
CORRUPTIONS_FILE = "corruptions.json"
PREDICTIONS_FOLDER = "predictions"
# All that is said of the model in a folder, and of no other.
FIGURE_FILES = (
    METRICS_FILE, CORRUPTIONS_FILE, f"{PREDICTIONS_FOLDER}/*.parquet", ".eval_results/*.yaml",
    "report.html", "report.json",
)  # fmt: skip


def refuse_occupied(folder: Path) -> None:
    """Raises: UserError if an output folder holds a run, finished or not, or is a file."""
    if folder.is_file():
        raise UserError(f"--output_dir {folder} is a file; pass a folder")
    if (folder / "config.json").exists() or any(folder.glob("checkpoint-*")):
        raise UserError(
            f"{folder} holds another run; pass another --output_dir, or --resume_from_checkpoint last"
        )
    if (folder / CONFIG_FILE).exists():
        raise UserError(
            f"{folder} holds another run, which saved no checkpoint; pass another --output_dir, or remove it"
        )
    if any(folder.glob(f"seed-*/{CONFIG_FILE}")):
        raise UserError(
            f"{folder} holds runs with --seeds; pass another --output_dir, or go on with the same --seeds "
            "and --resume_from_checkpoint last"
        )


def run_data_tokens(folder: Path) -> list[str]:
    """The data options of a run's config.yaml, as tokens; none without the file."""
    path, names = folder / CONFIG_FILE, field_names(DataConfig)
    if not path.is_file():
        return []
    tokens, kept = yaml_tokens(path.read_bytes(), str(path)), False
    chosen = []
    for token in tokens:  # an option, then its values
        if token.startswith("--"):
            kept = token[2:] in names
        if kept:
            chosen.append(token)
    return chosen


def run_data(folder: Path) -> DataConfig:
    """The data of a run. Raises: UserError if the folder has no config.yaml."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE} that names its data")
    data, *_ = parse([DataConfig], run_data_tokens(folder), "hf-cifar")
    return data


def read_record(path: Path) -> dict[str, Any]:
    """What one of a run's YAML or JSON files holds. Raises: UserError if it is missing or damaged."""
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError, yaml.YAMLError):
        raise UserError(f"{path} cannot be read") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a run's")
    return content


def require_finished(folder: Path) -> None:
    """Raises: UserError if there is no run in the folder that has ended."""
    missing = [
        name
        for name in (CONFIG_FILE, RUN_FILE, METRICS_FILE, WEIGHTS_FILE)
        if not (folder / name).is_file()
    ]
    if missing:
        raise UserError(
            f"{folder} holds no finished run: no {missing[0]}; pass the output folder of one, see hf-cifar "
            "runs"
        )


def remove_figures(folder: str | Path) -> None:
    """Remove what was said of a model that another has replaced."""
    for pattern in FIGURE_FILES:
        for path in Path(folder).glob(pattern):
            path.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file maps; nothing if there is no such file. Raises: UserError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and evaluate again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (not a mapping); remove it, and evaluate again")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step: a reader sees the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
