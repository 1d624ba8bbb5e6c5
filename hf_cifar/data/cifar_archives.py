"""The official CIFAR-10 and CIFAR-100 files, read without executing their pickles.

A python-version batch is a pickle. Its code is never run: numpy's classes are replaced by inert records,
and every other name is refused.

Source: https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from hf_cifar.errors import UserError

SIDE = 32
PIXELS = 3 * SIDE * SIDE


class _Record:
    """Inert stand-in for numpy's array and dtype while a batch is read: it stores the state."""

    def __init__(self, *args: Any) -> None:
        self.args, self.state = args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _reconstruct(*args: Any) -> _Record:
    return _Record(*args)


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


SAFE_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Record,
    ("numpy", "dtype"): _Record,
    # Protocol 2 pickles written by Python 3 hold bytes as encode(text, "latin1").
    ("_codecs", "encode"): _encode,
}


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE_NAMES:
            raise UserError(
                f"a CIFAR batch refers to {module}.{name}; this is not an official file and was not loaded"
            )
        return SAFE_NAMES[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise UserError(
            "a CIFAR batch refers to an outside object; this is not an official file and was not loaded"
        )


def read_pickle(stream: Any, name: str) -> dict[bytes, Any]:
    """Read one pickled batch or meta file as plain values, without executing any of it."""
    try:
        content = _InertUnpickler(stream, encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(f"{name} is not a readable CIFAR batch: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} is not a CIFAR batch: it holds a {type(content).__name__}")
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


def _pixels(value: Any, name: str) -> np.ndarray:
    """Convert the inert record of a batch's `data` array to [N, 32, 32, 3] uint8."""
    state = value.state if isinstance(value, _Record) else None
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[4], (bytes, str)):
        raise UserError(f"{name} is not a CIFAR batch: no pixel array under 'data'")
    raw = state[4] if isinstance(state[4], bytes) else state[4].encode("latin1")
    if len(raw) % PIXELS:
        raise UserError(
            f"{name} is not a CIFAR batch: {len(raw)} bytes of pixels, not a multiple of {PIXELS}"
        )
    # Row-major order for one batch; Fortran order would be a transposed matrix.
    flat = np.frombuffer(raw, np.uint8)
    flat = flat.reshape(PIXELS, -1).T if state[3] else flat.reshape(-1, PIXELS)
    return flat.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)


def _labels(content: dict[bytes, Any], names: list[bytes], source: str) -> dict[bytes, list[int]]:
    columns = {}
    for name in names:
        values = content.get(name)
        if not isinstance(values, list) or not all(isinstance(v, int) for v in values):
            raise UserError(
                f"{source} is not a CIFAR batch: no list of integers under {name.decode()!r}"
            )
        columns[name] = values
    return columns


PYTHON_FILES: dict[str, dict[str, Any]] = {
    "cifar10": {
        "train": [f"data_batch_{i}" for i in range(1, 6)],
        "test": ["test_batch"],
        "meta": ("batches.meta", {"label": b"label_names"}),
        "labels": {"label": b"labels"},
    },
    "cifar100": {
        "train": ["train"],
        "test": ["test"],
        "meta": (
            "meta",
            {"fine_label": b"fine_label_names", "coarse_label": b"coarse_label_names"},
        ),
        "labels": {"fine_label": b"fine_labels", "coarse_label": b"coarse_labels"},
    },
}
BINARY_FILES: dict[str, dict[str, Any]] = {
    "cifar10": {
        "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
        "test": ["test_batch.bin"],
        "meta": {"label": "batches.meta.txt"},
        "labels": ["label"],
    },
    "cifar100": {
        "train": ["train.bin"],
        "test": ["test.bin"],
        "meta": {"coarse_label": "coarse_label_names.txt", "fine_label": "fine_label_names.txt"},
        "labels": ["coarse_label", "fine_label"],
    },
}


class _Files:
    """The files of an archive or folder, by base name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.archive: tarfile.TarFile | None = None
        self.members: dict[str, Any]  # of an archive TarInfo, else Path
        if path.is_file():
            try:
                self.archive = tarfile.open(path)  # noqa: SIM115  read within this module's one call
                self.members = {
                    Path(m.name).name: m for m in self.archive.getmembers() if m.isfile()
                }
            except (tarfile.TarError, EOFError, OSError) as error:
                raise UserError(f"{path} is not a readable tar archive: {error}") from None
        else:
            self.members = {p.name: p for p in path.iterdir() if p.is_file()}

    def open(self, name: str) -> Any:
        member = self.members[name]
        return member.open("rb") if self.archive is None else self.archive.extractfile(member)


def cifar_version(path: Path) -> tuple[str, str] | None:
    """Detect an official archive or folder: ("cifar10" or "cifar100", "python" or "binary"), else None."""
    if path.is_file() and not path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return None
    names = set(_Files(path).members)
    for kind, files in PYTHON_FILES.items():
        if files["meta"][0] in names and names.intersection(files["train"]):
            return kind, "python"
    for kind, files in BINARY_FILES.items():
        if names.intersection(files["train"]) and names.intersection(files["meta"].values()):
            return kind, "binary"
    return None


def read_cifar(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, list[str]]]:
    """Read an official archive or folder.

    Returns ({"train": {"pixels": [N, 32, 32, 3] uint8, label column: list[int]}, "test": ...},
    {label column: class names}).
    Raises: UserError for a missing or damaged file.
    """
    found = cifar_version(path)
    assert found is not None  # the caller has checked
    kind, version = found
    files = _Files(path)
    layout = (PYTHON_FILES if version == "python" else BINARY_FILES)[kind]
    missing = [
        name for part in ("train", "test") for name in layout[part] if name not in files.members
    ]
    if missing:
        raise UserError(f"{path}: {missing[0]} is missing; unpack or download the archive again")
    read_part, read_names = (
        (_read_python, _python_names) if version == "python" else (_read_binary, _binary_names)
    )
    try:
        names = read_names(files, layout)
        parts = {part: read_part(files, layout, layout[part]) for part in ("train", "test")}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read completely ({error}); download it again") from None
    for part in parts.values():
        for column, class_names in names.items():
            if part[column] and not 0 <= min(part[column]) <= max(part[column]) < len(class_names):
                raise UserError(
                    f"{path}: a {column} is not one of the {len(class_names)} class names"
                )
    return parts, names


def _python_names(files: _Files, layout: dict) -> dict[str, list[str]]:
    meta_file, columns = layout["meta"]
    with files.open(meta_file) as stream:
        content = read_pickle(stream, meta_file)
    names = {}
    for column, key in columns.items():
        values = content.get(key)
        if not isinstance(values, list):
            raise UserError(f"{meta_file} has no class names for {column}")
        names[column] = [v.decode() if isinstance(v, bytes) else str(v) for v in values]
    return names


def _read_python(files: _Files, layout: dict, batches: list[str]) -> dict[str, Any]:
    pixels: list[np.ndarray] = []
    columns: dict[str, list[int]] = {column: [] for column in layout["labels"]}
    for batch in batches:
        with files.open(batch) as stream:
            content = read_pickle(stream, batch)
        pixels.append(_pixels(content.get(b"data"), batch))
        labels = _labels(content, list(layout["labels"].values()), batch)
        for column, key in layout["labels"].items():
            if len(labels[key]) != len(pixels[-1]):
                raise UserError(
                    f"{batch}: {len(pixels[-1])} images, but {len(labels[key])} values of {column}"
                )
            columns[column] += labels[key]
    return {"pixels": np.concatenate(pixels), **columns}


def _binary_names(files: _Files, layout: dict) -> dict[str, list[str]]:
    names = {}
    for column, name in layout["meta"].items():
        if name not in files.members:
            raise UserError(
                f"{files.path}: {name} is missing; unpack or download the archive again"
            )
        with files.open(name) as stream:
            names[column] = stream.read().decode().split()
    return names


def _read_binary(files: _Files, layout: dict, batches: list[str]) -> dict[str, Any]:
    width = len(layout["labels"]) + PIXELS
    records = []
    for batch in batches:
        with files.open(batch) as stream:
            raw = stream.read()
        if not raw or len(raw) % width:
            raise UserError(
                f"{batch}: {len(raw)} bytes, not a multiple of {width}; download it again"
            )
        records.append(np.frombuffer(raw, np.uint8).reshape(-1, width))
    rows = np.concatenate(records)
    labels = {column: rows[:, i].astype(int).tolist() for i, column in enumerate(layout["labels"])}
    pixels = rows[:, len(labels) :].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return {"pixels": pixels, **labels}
