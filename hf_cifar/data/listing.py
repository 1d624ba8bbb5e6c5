"""List the files below a folder: which are images, by their content, and what is left out, counted.

Training, evaluation and prediction share this one listing.
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from hf_cifar.config.run import CONFIG_FILE, is_run_config
from hf_cifar.data.formats import looks_like_image
from hf_cifar.data.images import REFUSED_FORMATS
from hf_cifar.errors import UserError
from hf_cifar.progress import Progress
from hf_cifar.text import listed, one_line

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
# Formats of Pillow that hold no photograph, or that it can only name.
NO_PHOTOS = {"BUFR", "CUR", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
HEIF_SUFFIXES = {".heic", ".heics", ".heif", ".heifs", ".hif"}
# Camera raw files lie beside the JPEG of the same shot, and most of them begin as a TIFF file does.
RAW_SUFFIXES = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef", ".nrw", ".orf",
    ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
}  # fmt: skip
# What systems and programs leave in folders, in lower case.
SYSTEM_NAMES = {
    "$recycle.bin", "#recycle", "@eadir", "__macosx", "__pycache__", "desktop.ini", "ehthumbs.db", "icon\r",
    "lost+found", "picasa.ini", "system volume information", "thumbs.db",
}  # fmt: skip
HIDDEN, SYSTEM, OWN_RUNS = "hidden", "system", "of runs"
BROKEN, SEEN, NO_IMAGE = "broken", "already listed", "not images"
MAX_REASONS = 6  # in a line
HEAD_BYTES = 32


class File(NamedTuple):
    """A file: its path below the root, with slashes and composed characters (NFC), and where it is."""

    name: str
    path: str


@dataclass
class Listing:
    """The files below `root`, sorted by name.

    others: files that are not images. left_out: files that are never looked into, counted by
    reason. folders: names of all folders below the root, without hidden ones. run_parents: the folders that
    hold folders of runs, at any depth. mounts: folders elsewhere, by their names below the root.
    """

    root: str
    images: list[File] = field(default_factory=list)
    others: list[File] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    folders: list[str] = field(default_factory=list)
    run_parents: set[str] = field(default_factory=set)
    mounts: dict[str, str] = field(default_factory=dict)

    def all_left_out(self, used: Container[str] = ()) -> Counter[str]:
        """Count everything that is not an image, by reason. used: paths of tables, which are read."""
        return self.left_out + Counter(
            kind_of(file.name) for file in self.others if file.path not in used
        )


def list_files(root: str | Path, mounts: dict[str, str] | None = None) -> Listing:
    """List a folder and everything below it. Links are followed, but no folder is listed twice below a class.

    mounts: folders elsewhere that count as folders of this name directly below the root.
    Raises: UserError for a folder that cannot be listed.
    """
    listing = Listing(os.path.abspath(root), mounts=mounts or {})
    # Prefix of the names, folder, and the identities of it and those above.
    todo: list[tuple[str, str, tuple[tuple[int, int], ...]]]
    todo = [("", listing.root, (_identity(listing.root),))]
    todo += [(f"{name}/", path, (_identity(path),)) for name, path in listing.mounts.items()]
    seen: set[tuple[str, tuple[int, int]]] = set()
    shown = Progress(f"listing {os.path.basename(listing.root)}", unit="files")
    while todo:
        prefix, folder, above = todo.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"cannot list folder {one_line(folder)}: {error.strerror}; make it readable, or remove it"
            ) from None
        if prefix and any(e.name == CONFIG_FILE and is_run_config(e.path) for e in entries):
            listing.left_out[OWN_RUNS] += _count_below(folder)
            parts = prefix.split("/")[:-2]
            listing.run_parents |= {"/".join(parts[: n + 1]) for n in range(len(parts))}
            continue
        if prefix:
            listing.folders.append(prefix[:-1])
        shown.update(len(entries))
        for entry in entries:
            name = prefix + composed(entry.name)
            reason = HIDDEN if entry.name.startswith(".") else SYSTEM
            if reason is HIDDEN or entry.name.lower() in SYSTEM_NAMES:
                is_folder = entry.is_dir(follow_symlinks=False)
                listing.left_out[reason] += _count_below(entry.path) if is_folder else 1
            elif _is_cycle(entry):
                listing.left_out[BROKEN] += 1
            elif entry.is_dir():
                identity = _identity(entry.path)
                branch = name.split("/")[0] if prefix else name
                if identity in above or (prefix and (branch, identity) in seen):
                    listing.left_out[SEEN] += 1
                    continue
                seen.add((branch, identity))
                todo.append((f"{name}/", entry.path, (*above, identity)))
            elif entry.is_file():
                files = listing.images if is_image_file(entry.path) else listing.others
                files.append(File(name, entry.path))
            else:  # a link to nothing, a pipe, a socket
                listing.left_out[BROKEN if entry.is_symlink() else NO_IMAGE] += 1
    shown.close()
    listing.images.sort()
    listing.others.sort()
    listing.folders.sort()
    return listing


def _is_cycle(entry: os.DirEntry) -> bool:
    """True for a link that leads to itself, or to a place that cannot be reached."""
    try:
        entry.is_dir()
    except OSError:
        return True
    return False


def _identity(path: str) -> tuple[int, int]:
    """Device and number of a folder, the same for all links to it."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read {one_line(path)}: {error.strerror}") from None
    return status.st_dev, status.st_ino


def _count_below(folder: str) -> int:
    """Count the files of a folder that is left out, without following links."""
    return sum(len(files) for _, _, files in os.walk(folder))


def composed(name: str) -> str:
    """Compose the characters of a name (Unicode NFC), as most systems write them; bytes that are not
    text become escapes."""
    if name.isascii():
        return name
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


def is_image_file(path: str) -> bool:
    """True for a file with the suffix of an image, or with the first bytes of one.

    Such a file may still be damaged. A camera raw file does not count.
    """
    suffix = suffix_of(path)
    if suffix in image_suffixes():
        return True
    if suffix in RAW_SUFFIXES:
        return False
    try:
        with open(path, "rb", buffering=0) as file:
            return looks_like_image(file.read(HEAD_BYTES))
    except OSError:
        return False


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of images, in lower case."""
    form_of = Image.registered_extensions()
    known = set(Image.ID) - REFUSED_FORMATS - NO_PHOTOS
    found = {suffix for suffix, form in form_of.items() if form in known}
    return frozenset(found | HEIF_SUFFIXES | {".avif"})


def suffix_of(name: str) -> str:
    """The suffix of a file's name, in lower case and with its dot; empty if it has none."""
    return os.path.splitext(name)[1].lower()


def kind_of(name: str) -> str:
    """Name the kind of a file that is not an image, for a count: its suffix if that is a plain one."""
    if os.path.basename(name).startswith("events.out.tfevents."):  # of TensorBoard
        return ".tfevents"
    suffix = suffix_of(name)
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else NO_IMAGE


def list_images(folder: str | Path) -> tuple[list[str], Counter[str]]:
    """List the images below a folder, and count what is left out. Raises: UserError as `list_files`."""
    listing = list_files(folder)
    names = [os.path.relpath(file.path, listing.root) for file in listing.images]
    return [os.path.join(folder, name) for name in names], listing.all_left_out()


def render_left_out(left_out: Counter[str], what: str = "file") -> str:
    """Render counts: `12 files (7 .txt, 3 hidden, 2 not images)`."""
    total = sum(left_out.values())
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = listed((f"{count:,} {reason}" for reason, count in most if count), MAX_REASONS)
    return f"{total:,} {what}{'s' if total != 1 else ''} ({parts})"


def refuse_data_folder(folder: Path, dataset_name: str | None) -> None:
    """Raises: UserError for an output folder that is the data set, or one of its folders of images."""
    if not dataset_name or not folder.is_dir():
        return
    data = Path(dataset_name).expanduser().resolve()
    inside = data.is_dir() and folder.resolve().is_relative_to(data)
    if inside and (folder.resolve() == data or list_files(folder).images):
        raise UserError(
            f"--output_dir {folder} holds the data; pass a new folder, which may be inside it"
        )
