"""Keep arrays that are slow to make (decoded images, features) on disk for the next run.

One safetensors file each, in $HF_CIFAR_CACHE or ~/.cache/huggingface/hf_cifar. The key is a hash of all that
the array was made from, so that other data never finds it; a checksum detects a damaged file.
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

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from filelock import FileLock
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

logger = logging.getLogger(__name__)
# Part of the key: raise it when `data.images` decodes differently.
DECODER = 2
# Bytes of all files together; the least recently used are deleted first.
SIZE_LIMIT = 20 * 1024**3


def cache_folder() -> Path:
    """The folder of the files."""
    return Path(os.environ.get("HF_CIFAR_CACHE") or Path(constants.HF_HOME, "hf_cifar"))


def content_key(rows: Dataset) -> str:
    """SHA-256 of the encoded images in order; of the path, size and modification time of a file outside."""
    digest = hashlib.sha256(b"%d" % DECODER)
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for chunk in table.column("image").chunks:
            contents, paths = pc.struct_field(chunk, "bytes"), pc.struct_field(chunk, "path")
            for content, path in zip(contents, paths, strict=True):
                if content.is_valid:
                    data = content.as_buffer()
                    digest.update(b"%d " % data.size)
                    digest.update(data)
                else:
                    digest.update(_file_key(path.as_py()))
    return digest.hexdigest()


def _file_key(path: str | None) -> bytes:
    try:
        status = os.stat(path or "")
        return f"{path} {status.st_size} {status.st_mtime_ns} ".encode()
    except OSError:
        return f"{path} missing ".encode()


@contextlib.contextmanager
def one_process_at_a_time(key: str) -> Iterator[None]:
    """Let one process make an array while the others on this machine wait, to find it on disk then."""
    lock = FileLock(cache_folder() / f"{key}.lock")
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):
        # No writable folder, or no locks: nothing will be kept either.
        yield
        return
    try:
        yield
    finally:
        lock.release()


def load_array(key: str) -> np.ndarray | None:
    """Load the array that `save_array` kept under a key; None if there is no file, or a damaged one."""
    path = cache_folder() / f"{key}.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:
            array = file.get_tensor("array")
            checksum = file.metadata()["crc32"]
    except (OSError, SafetensorError, KeyError, TypeError):
        return None
    if f"{zlib.crc32(array):08x}" != checksum:
        logger.warning("%s is damaged; making it again", path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used now
    return array


def save_array(key: str, array: np.ndarray) -> None:
    """Keep an array, atomically. If the disk is full or read-only, nothing is kept and the run continues."""
    folder = cache_folder()
    path = folder / f"{key}.safetensors"
    # A folder, because safetensors first writes a file with a random name, which a killed process leaves.
    staging = folder / f".{key}.tmp"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        _make_room(folder, array.nbytes)
        save_file({"array": array}, staging / "array", {"crc32": f"{zlib.crc32(array):08x}"})
        os.replace(staging / "array", path)
    except (OSError, SafetensorError) as error:
        logger.warning("nothing is kept in %s for the next run: %s", folder, error)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _make_room(folder: Path, num_bytes: int) -> None:
    found = [*folder.glob("*.safetensors"), *folder.glob(".*.tmp/*")]
    files = sorted(found, key=lambda path: path.stat().st_mtime)
    used = sum(path.stat().st_size for path in files)
    for path in files:
        if used + num_bytes <= SIZE_LIMIT:
            return
        used -= path.stat().st_size
        path.unlink(missing_ok=True)
