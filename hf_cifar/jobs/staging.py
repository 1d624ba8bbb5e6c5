"""Gather what a run needs from this machine for another one: options, data, model and the package itself."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.util
import os
import zipfile
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from hf_cifar.config.model import BUNDLED
from hf_cifar.config.run import RunConfig
from hf_cifar.data.listing import TABLE_SUFFIXES, list_files
from hf_cifar.data.tables import holds_images
from hf_cifar.errors import UserError
from hf_cifar.hub.reach import looks_like_path

CONFIG, DATA, LABELS, MODEL = "config.yaml", "data", "labels", "model"
MODEL_FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json",
    "processor_config.json", "*.py",
)  # fmt: skip
# Of zip: one time for all members makes equal files of equal content.
OLDEST = (1980, 1, 1, 0, 0, 0)


def stage_run(
    config: RunConfig, mount: str, scratch: Path
) -> tuple[dict[str, str | Path], RunConfig]:
    """Return a run's files by name, and its options with the paths that the files have below `mount`.

    scratch: a folder for files that are made here: the package as a wheel, and a folder of data as a zip.
    Raises: UserError for local files that would be missing there.
    """
    files: dict[str, str | Path] = {}
    data, model = config.data, config.model
    if looks_like_path(data.dataset_name):
        data = dataclasses.replace(data, **_stage_data(config, mount, scratch, files))
    if looks_like_path(model.model_name_or_path):
        folder = Path(model.model_name_or_path).expanduser().resolve()
        for path in sorted({path for each in MODEL_FILES for path in folder.glob(each)}):
            files[f"{MODEL}/{folder.name}/{path.name}"] = path
        model = dataclasses.replace(model, model_name_or_path=f"{mount}/{MODEL}/{folder.name}")
    for name, value in config.trainer.items():
        if isinstance(value, str) and os.path.isfile(value):
            raise UserError(
                f"--{name} is {value}, a file on this machine, which the job cannot read; leave it out, or "
                "pass its content as JSON"
            )
    there = dataclasses.replace(config, data=data, model=model)
    wheel = build_wheel(scratch)
    return {CONFIG: there.to_yaml(), **files, wheel.name: wheel}, there


def _stage_data(
    config: RunConfig, mount: str, scratch: Path, files: dict[str, str | Path]
) -> dict[str, Any]:
    """Add the data set and its table of labels to the files, and return the options that name them there."""
    path = Path(config.data.dataset_name).expanduser().resolve()
    if path.name.lower().endswith(TABLE_SUFFIXES) and not holds_images(str(path)):
        raise UserError(
            f"{config.data.dataset_name} lists files on this machine, which the job cannot read; pass their "
            "folder as --dataset_name, and the table as --labels_file"
        )
    staged = path
    if path.is_dir():
        staged = scratch / f"{path.name}.zip"
        listing = list_files(path)  # as the run lists it: links to folders are followed
        pack(
            staged,
            sorted((each.name, Path(each.path)) for each in (*listing.images, *listing.others)),
        )
    files[f"{DATA}/{staged.name}"] = staged
    options: dict[str, Any] = {"dataset_name": f"{mount}/{DATA}/{staged.name}"}
    if config.data.labels_file is not None:
        table = Path(config.data.labels_file).expanduser()
        if table.is_file() and table.resolve().is_relative_to(path):
            options["labels_file"] = table.resolve().relative_to(path).as_posix()
        elif table.is_file():
            files[f"{LABELS}/{table.name}"] = table
            options["labels_file"] = f"{mount}/{LABELS}/{table.name}"
    return options


def files_below(folder: Path) -> Iterable[tuple[str, Path]]:
    """Yield the files below a folder with their relative names, sorted, without hidden ones."""
    for path, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield (Path(path) / name).relative_to(folder).as_posix(), Path(path) / name


def pack(
    target: Path, members: Iterable[tuple[str, Path | str]], *, compress: bool = False
) -> None:
    """Write a zip of files and texts by their names. Equal members make an equal file.

    Raises: UserError for a file name that is not text.
    """
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members:
            try:
                member = zipfile.ZipInfo(name, OLDEST)
                member.compress_type, member.external_attr = method, 0o644 << 16
                if isinstance(content, str):
                    archive.writestr(member, content)
                    continue
                member.file_size = content.stat().st_size
                with content.open("rb") as source, archive.open(member, "w") as file:
                    while chunk := source.read(1 << 20):
                        file.write(chunk)
            except UnicodeEncodeError:
                raise UserError(
                    f"the file name {name!r} is not valid Unicode and cannot be uploaded; rename it"
                ) from None


def build_wheel(folder: Path) -> Path:
    """Write the installed package as a wheel, so that the job runs the same code, released or not."""
    installed = distribution("hf-cifar")
    spec = importlib.util.find_spec("hf_cifar")
    assert spec is not None and spec.origin is not None
    package, info = Path(spec.origin).parent, f"hf_cifar-{installed.version}.dist-info"
    members: dict[str, Path | str] = {
        f"hf_cifar/{name}": path
        for name, path in files_below(package)
        if "__pycache__" not in path.parts
    }
    # An editable installation may be found by its egg-info, which has another name for it.
    metadata = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    members |= {
        f"{info}/METADATA": metadata,
        f"{info}/entry_points.txt": installed.read_text("entry_points.txt") or "",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hf-cifar\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = [f"{name},{_recorded(content)}" for name, content in members.items()]
    members[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""])
    wheel = folder / f"hf_cifar-{installed.version}-py3-none-any.whl"
    pack(wheel, members.items(), compress=True)
    return wheel


def _recorded(content: Path | str) -> str:
    """Return hash and size of a file, as a wheel records them."""
    raw = content.encode() if isinstance(content, str) else content.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()
    return f"sha256={digest},{len(raw)}"


def extras_of(config: RunConfig) -> list[str]:
    """Return the extras of the package that a run needs."""
    names = (config.model.model_name_or_path, config.data.dataset_name)
    wanted = {
        "bundled": any(name.startswith(BUNDLED) for name in names),
        # It may have read the data here.
        "heif": importlib.util.find_spec("pillow_heif") is not None,
        "lora": bool(config.model.lora_rank),
        "track": bool(config.train.report_to),
    }
    return [name for name, needed in wanted.items() if needed]
