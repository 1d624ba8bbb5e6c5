"""Cache arrays that are slow to compute (decoded images, features) on disk for later runs.

One safetensors file each, in $HF_CIFAR_CACHE or ~/.cache/huggingface/hf_cifar. The key hashes everything that
determines the array, so other data has another key; a checksum detects a damaged file.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc
from datasets import Dataset
from filelock import FileLock
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hf_cifar.data.pixel_file import names_in_use
from hf_cifar.progress import Progress

logger = logging.getLogger(__name__)
# Part of the key: increment it when `data.images` decodes differently.
DECODER = 2
# Total bytes of all files; the least recently used are deleted first.
SIZE_LIMIT = 20 * 1024**3


def cache_folder() -> Path:
    """The folder of the cached files."""
    return Path(os.environ.get("HF_CIFAR_CACHE") or Path(constants.HF_HOME, "hf_cifar"))


def content_key(rows: Dataset) -> str:
    """SHA-256 of the encoded images in order; of a file that is only referenced, its path, size and time."""
    digest = hashlib.sha256(b"%d" % DECODER)
    with Progress("identifying images", len(rows)) as shown:
        for table in rows.with_format("arrow").iter(batch_size=1000):
            for chunk in table.column("image").chunks:
                _add_cells(digest, chunk)
            shown.update(len(table))
    return digest.hexdigest()


def _add_cells(digest: Any, cells: pyarrow.Array) -> None:
    contents, paths = pc.struct_field(cells, "bytes"), pc.struct_field(cells, "path")
    for content, path in zip(contents, paths, strict=True):
        if content.is_valid:
            data = content.as_buffer()
            digest.update(b"%d " % data.size)
            digest.update(data)
        else:
            digest.update(_file_key(path.as_py()))


def _file_key(path: str | None) -> bytes:
    try:
        status = os.stat(path or "")
        return f"{path} {status.st_size} {status.st_mtime_ns} ".encode()
    except OSError:
        return f"{path} missing ".encode()


@contextlib.contextmanager
def one_process_at_a_time(key: str) -> Iterator[None]:
    """Hold a lock, so that one process makes an array and the others on this machine wait to load it."""
    lock = FileLock(cache_folder() / f"{key}.lock")
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        # No writable folder, or no support for locks: nothing will be cached either.
        yield
        return
    try:
        yield
    finally:
        lock.release()


def load_array(key: str) -> np.ndarray | None:
    """Load the array that `save_array` stored under a key; None if the file is missing or damaged."""
    path = cache_folder() / f"{key}.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            array = file.get_tensor("array")
            checksum = file.metadata()["crc32"]
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    if f"{zlib.crc32(array.data):08x}" != checksum:
        logger.warning("%s is damaged and will be recomputed", path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # marks it as recently used
    return array


def save_array(key: str, array: np.ndarray) -> None:
    """Save an array atomically. If the disk is full or read-only, log a warning and continue."""
    folder = cache_folder()
    path = folder / f"{key}.safetensors"
    # A folder, because safetensors first writes to a random file name, which a killed process leaves behind.
    staging = folder / f".{key}.tmp"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        make_room(folder, array.nbytes)
        save_file({"array": array}, staging / "array", {"crc32": f"{zlib.crc32(array.data):08x}"})
        os.replace(staging / "array", path)
    except (OSError, SafetensorError) as error:
        logger.warning("cannot cache in %s for later runs: %s", folder, error)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def make_room(folder: Path, num_bytes: int) -> None:
    """Delete the least recently used files, except those that this process uses, if the cache would exceed
    its limit."""
    groups: dict[str, dict[Path, os.stat_result]] = {}
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.pixels"), *folder.glob("*.rows")]:
        with contextlib.suppress(FileNotFoundError):  # another process deletes files, too
            groups.setdefault(path.stem, {})[path] = path.stat()
    for path in folder.glob(".*.tmp/*"):
        with contextlib.suppress(FileNotFoundError):
            groups[str(path)] = {path: path.stat()}
    sizes = {name: sum(map(disk_bytes, parts.values())) for name, parts in groups.items()}
    last_used = {
        name: max(each.st_mtime for each in parts.values()) for name, parts in groups.items()
    }
    used = sum(sizes.values())
    for name in sorted(groups.keys() - names_in_use(), key=last_used.__getitem__):
        if used + num_bytes <= SIZE_LIMIT:
            return
        used -= sizes[name]
        for path in groups[name]:
            with contextlib.suppress(OSError):  # in use on Windows
                path.unlink(missing_ok=True)


def disk_bytes(status: os.stat_result) -> int:
    """Bytes that a file takes on the disk: less than its size, if parts of it were never written."""
    return getattr(status, "st_blocks", status.st_size // 512 + 1) * 512


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which may not exist yet."""
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(existing).free
