"""Checkpoints that are complete or absent.

A checkpoint is written to a temporary folder, then hashed and renamed while training continues; a run resumes
from the newest complete one. It is a folder `checkpoint-STEP` with a list of its files' SHA-256 in the format
of `sha256sum -c`. Tensors and plain values are stored as safetensors, which run no code when they are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_cifar.errors import UserError
from hf_cifar.platform import flush_to_disk
from hf_cifar.runs.folder import RunFolder
from hf_cifar.text import one_line

logger = logging.getLogger(__name__)

SUMS_FILE = "SHA256SUMS"
# Temporary folders. One found at start-up was left by a killed process.
STAGING, TRASH = ".checkpoint-staging", ".checkpoint-trash"


@contextlib.contextmanager
def written_aside(
    run_folder: Path, step: int, *, is_main: bool, wait: Callable[[], None]
) -> Iterator[Path]:
    """Yield a temporary folder to write a checkpoint into; `complete_checkpoint` completes it.

    is_main: True in the process that creates the folder for all others. wait: blocks until all processes have
    called it.

    Raises: UserError if it cannot be written; the folder is then removed.
    """
    staging = run_folder / STAGING
    with checkpoint_errors(run_folder, step, is_main):
        if is_main:
            _remove_temporary(run_folder)
            staging.mkdir(parents=True)
        wait()
        yield staging
        wait()


def complete_checkpoint(run_folder: Path, step: int) -> None:
    """Hash and flush the files of a temporary folder, and rename it to `checkpoint-STEP`.

    Replaces an older checkpoint of this step.
    Raises: UserError if that fails; an older checkpoint of the step is then unchanged.
    """
    staging, final = run_folder / STAGING, run_folder / f"checkpoint-{step}"
    with checkpoint_errors(run_folder, step, is_main=True):
        _seal(staging)
        _replace(final, staging, aside=run_folder / TRASH)
        flush_to_disk(run_folder)
        _remove_temporary(run_folder)


@contextlib.contextmanager
def checkpoint_errors(run_folder: Path, step: int, is_main: bool) -> Iterator[None]:
    """Remove a partly written checkpoint, and report an OS error as a one-line UserError."""
    try:
        yield
    except BaseException as error:
        if is_main:
            _remove_temporary(run_folder)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"cannot save a checkpoint at step {step} in {run_folder}: {reason}; make room, then "
            "resume from the previous one with --resume_from_checkpoint last"
        ) from None


def _replace(folder: Path, new: Path, *, aside: Path) -> None:
    """Rename `new` to `folder`. An existing folder is moved aside, and back if that fails."""
    replaced = folder.exists()
    if replaced:
        os.rename(folder, aside)
    try:
        os.rename(new, folder)
    except OSError:
        if replaced:
            os.rename(aside, folder)
        raise


def newest_checkpoint(run_folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint, or None. Warns of each newer one that is damaged."""
    for folder in RunFolder(run_folder).checkpoints():
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning("%s is damaged: %s; trying the previous one", folder, damage)
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Describe the damage of a checkpoint; None if every file is as it was written."""
    try:
        lines = (checkpoint / SUMS_FILE).read_bytes().decode().splitlines(keepends=True)
    except FileNotFoundError:
        return f"it has no {SUMS_FILE}"
    except (OSError, UnicodeDecodeError) as error:
        return f"{SUMS_FILE} cannot be read ({error})"
    sums = {}
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)\n", line)
        if match is None:
            return f"{SUMS_FILE} is not a list of checksums"
        sums[match[2]] = match[1]
    there = set(_files(checkpoint))
    for name in sorted(there ^ sums.keys()):
        return f"{name} is missing" if name in sums else f"{name} does not belong to it"
    try:
        with ThreadPoolExecutor(4) as pool:
            found = dict(
                zip(sums, pool.map(lambda name: file_hash(checkpoint / name), sums), strict=True)
            )
    except OSError as error:
        return str(error)
    return next(
        (f"{name} differs from its checksum" for name in sums if found[name] != sums[name]), None
    )


def remove_old_checkpoints(run_folder: Path, *, keep: set[Path], limit: int | None) -> None:
    """Remove the oldest checkpoints until at most `limit` are left, or only those of `keep`."""
    checkpoints = RunFolder(run_folder).checkpoints()
    surplus = len(checkpoints) - limit if limit else 0
    for folder in [path for path in reversed(checkpoints) if path not in keep][: max(0, surplus)]:
        # Renamed first, so that a partly removed checkpoint is never found.
        os.rename(folder, run_folder / TRASH)
        _remove_temporary(run_folder)


def save_state(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values into one safetensors file.

    Raises: UserError for a value of another type.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_to_plain(state, tensors))
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        # safetensors refuses tensors that share memory, or are part of a larger one.
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensors[name] = tensor.clone()
        storages.add(storage.data_ptr())
    save_file(tensors, path, metadata={"tree": tree})


def load_state(path: Path) -> Any:
    """Read what `save_state` wrote: tensors on the CPU, with their strides.

    Raises: UserError for any other file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads(file.metadata()["tree"])
            return _from_plain(tree, file.get_tensor)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is not a saved state: {one_line(error)}") from None


def _to_plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the value as JSON: other types become lists starting with a name, tensors go to `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        # In memory order, because an optimiser's moments have the memory format of their weights.
        order = sorted(range(value.ndim), key=lambda dim: (-value.stride(dim), dim))
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().permute(order).contiguous()
        return ["tensor", name, order]
    if isinstance(value, dict):
        items = [[_to_plain(k, tensors), _to_plain(v, tensors)] for k, v in value.items()]
        return ["dict", items]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_to_plain(item, tensors) for item in value]]
    raise UserError(
        f"a checkpoint cannot hold a {type(value).__name__}; use another --optim or schedule"
    )


def _from_plain(tree: Any, tensor_of: Callable[[str], Tensor]) -> Any:
    if not isinstance(tree, list):
        return tree
    if tree[0] == "tensor":
        order = tree[2]
        return tensor_of(tree[1]).permute([order.index(dim) for dim in range(len(order))])
    if tree[0] == "dict":
        return {_from_plain(k, tensor_of): _from_plain(v, tensor_of) for k, v in tree[1]}
    return {"list": list, "tuple": tuple}[tree[0]](_from_plain(item, tensor_of) for item in tree[1])


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(folder: Path) -> None:
    """Hash and flush all files of a folder, and write the list of checksums last."""
    names = sorted(_files(folder))
    with ThreadPoolExecutor(4) as pool:
        flushed = pool.map(lambda name: flush_to_disk(folder / name), names)
        sums = list(pool.map(lambda name: file_hash(folder / name), names))
        list(flushed)  # raises errors of the flush
    text = "".join(f"{digest}  {name}\n" for digest, name in zip(sums, names, strict=True))
    (folder / SUMS_FILE).write_bytes(text.encode())
    flush_to_disk(folder / SUMS_FILE)
    flush_to_disk(folder)


def _files(folder: Path) -> list[str]:
    """List the names of all files below a folder, except the list of checksums."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if name != SUMS_FILE]


def _remove_temporary(run_folder: Path) -> None:
    for name in (STAGING, TRASH):
        shutil.rmtree(run_folder / name, ignore_errors=True)
