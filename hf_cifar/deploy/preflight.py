"""Find mistakes in the arguments of `export`, `prune`, `quantize` and `compress` before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_cifar.config.deployment import CompressConfig, ExportConfig, PruneConfig, QuantizeConfig
from hf_cifar.errors import UserError
from hf_cifar.models.names import check_model_name
from hf_cifar.runs.folder import RunFolder, refuse_other_files, require_writable

SERVER_CONFIG = "config.pbtxt"  # of an exported folder for a server
UNFINISHED = "unfinished.json"  # the call that makes a folder of compress, until it has ended


def check_export(run: Path, config: ExportConfig) -> None:
    """Raises: UserError for a folder without a model, or an output that cannot be written."""
    check_output(config)
    check_model_name(
        str(run),
        trust_remote_code=config.trust_remote_code,
        purpose="the --output_dir of a run",
    )


def check_output(config: ExportConfig) -> None:
    """Raises: UserError if the output exists and may not be replaced, or cannot be written."""
    output = Path(config.output)
    if not output.name:
        raise UserError(f"--output {output} has no name; pass a new folder")
    require_writable(output.parent, "--output")
    weights = output.with_suffix(".bin")
    if config.format == "openvino" and weights.exists() and not config.overwrite:
        raise UserError(f"{weights} exists; pass another --output, or --overwrite to replace it")
    if not output.exists() and not output.is_symlink():
        return
    ours = config.format != "server" or (output / SERVER_CONFIG).is_file()
    if output.is_dir() != (config.format == "server") or not ours:
        kind = "a folder" if output.is_dir() else "a file"
        raise UserError(
            f"--output {output} is {kind}, which --format {config.format} does not replace; pass another "
            "--output"
        )
    if not config.overwrite:
        raise UserError(f"{output} exists; pass another --output, or --overwrite to replace it")


def check_quantize(run: Path, config: QuantizeConfig) -> None:
    """Raises: UserError for a run that is not finished, or an output that cannot be written."""
    RunFolder(run).require_finished()
    check_output(ExportConfig(output=config.output, overwrite=config.overwrite))


def check_prune(run: Path, config: PruneConfig) -> None:
    """Raises: UserError for a run that is not finished, or an output folder that is in use."""
    RunFolder(run).require_finished()
    output = Path(config.output_dir)
    RunFolder(output).refuse_occupied()
    refuse_other_files(output)


def check_compress(run: Path, config: CompressConfig) -> None:
    """Raises: UserError for runs that are not finished or share a name, or an output folder that is in use,
    unless the same call left it when it was interrupted."""
    candidates = [Path(each).resolve() for each in config.candidates or ()]
    for each in (run, *candidates):
        RunFolder(each).require_finished()
    names = [each.name for each in candidates]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--candidates has two runs named {repeated[0]}; rename the folder of one")
    folder = Path(config.output_dir)
    note = folder / UNFINISHED
    if not note.is_file():
        refuse_other_files(folder)
    elif json.loads(note.read_text(encoding="utf-8")) != call_of(run, config):
        raise UserError(
            f"--output_dir {folder} holds an unfinished comparison with other options; repeat its "
            "command, or pass another folder"
        )


def call_of(run: Path, config: CompressConfig) -> dict[str, Any]:
    """Return what makes two calls of compress the same, as plain values."""
    return {
        "run": str(run.resolve()), "trained": RunFolder(run).facts()["finished"],
        "target_sizes": config.target_sizes, "num_train_epochs": config.num_train_epochs,
    }  # fmt: skip
