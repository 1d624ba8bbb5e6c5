"""Unpack a zip or tar of images into the cache, so that it is read as a folder."""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, NamedTuple

from hf_cifar.data.cache import cache_folder, one_process_at_a_time
from hf_cifar.data.listing import ARCHIVE_SUFFIXES, image_suffixes
from hf_cifar.errors import UserError
from hf_cifar.progress import Progress
from hf_cifar.text import one_line

OTHER_ARCHIVES = (".7z", ".rar", ".tar.zst")
# Archives of photographs unpack to fewer bytes than this per byte; small archives are exempt.
MAX_RATIO = 100
MIN_BOMB_BYTES = 256 * 1024**2
MAX_MEMBERS = 5_000_000
SPARE_BYTES = 256 * 1024**2  # of the disk, left free
CHUNK = 1024**2
DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError,
    NotImplementedError, RuntimeError,
)  # fmt: skip


def is_archive(path: str | Path) -> bool:
    """True for the name of a zip or tar."""
    return str(path).lower().endswith(ARCHIVE_SUFFIXES)


def refuse_other_archives(path: str | Path) -> None:
    """Raises: UserError for an archive of a kind that Python cannot unpack."""
    if str(path).lower().endswith(OTHER_ARCHIVES):
        raise UserError(f"{path} cannot be unpacked here; unpack it, and pass the folder")


def archive_name(path: str | Path) -> str:
    """The name of an archive without its suffix."""
    name = os.path.basename(path)
    suffix = max((s for s in ARCHIVE_SUFFIXES if name.lower().endswith(s)), key=len)
    return name[: -len(suffix)]


def is_web_dataset(path: str | Path) -> bool:
    """True for a tar in which files that share a name, such as 7.jpg and 7.cls, are the fields of a row.

    Raises: UserError for a file that is not a tar.
    """
    if str(path).lower().endswith(".zip"):
        return False
    fields: dict[str, set[str]] = {}
    try:
        with tarfile.open(path) as archive:
            for number, member in enumerate(archive):
                if number == 1000:
                    break
                folder, _, name = member.name.rpartition("/")
                if member.isfile() and not name.startswith("."):
                    key, _, field = name.partition(".")
                    fields.setdefault(f"{folder}/{key}", set()).add(
                        f".{field.rpartition('.')[2].lower()}"
                    )
    except DAMAGE as error:
        raise _damaged(path, error) from None
    known = image_suffixes()
    rows = {key: kinds for key, kinds in fields.items() if kinds & known}
    folders = {key.rpartition("/")[0] for key in rows}
    label = (
        {".cls", ".json"} if len(folders) == 1 else {".cls"}
    )  # annotations lie beside images, too
    return bool(rows) and all(kinds & label for kinds in rows.values())


def unpack(path: str | Path) -> Path:
    """Unpack an archive into the cache, and return the folder, which later calls reuse.

    Raises: UserError for a member that would land outside the folder, a bomb, an encrypted or damaged
    archive, or a full disk.
    """
    path = Path(path).resolve()
    status = path.stat()
    place = cache_folder() / "archives" / hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    target = place / f"{status.st_size}-{status.st_mtime_ns}"
    with one_process_at_a_time(f"unpack-{place.name}"):
        if target.is_dir():
            return target
        staging = place / f".{target.name}.tmp"
        try:
            shutil.rmtree(
                place, ignore_errors=True
            )  # of an older version of the file, or of a killed process
            staging.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"cannot unpack {path} into {place}: {error.strerror}; set HF_CIFAR_CACHE to a folder that "
                "can be written, or unpack the archive and pass the folder"
            ) from None
        try:
            _unpack_into(staging, path)
            os.replace(staging, target)
        except DAMAGE as error:
            raise _damaged(path, error) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _damaged(path: str | Path, error: Exception) -> Exception:
    if isinstance(error, UserError):
        return error
    if (
        isinstance(error, OSError)
        and error.errno is not None
        and not isinstance(error, tarfile.TarError)
    ):
        return error if error.errno == 28 else UserError(f"cannot read {path}: {one_line(error)}")
    return UserError(f"{path} cannot be unpacked ({one_line(error)}); download or pack it again")


def _unpack_into(folder: Path, path: Path) -> None:
    budget = _Budget(folder, path)
    is_zip = path.name.lower().endswith(".zip")
    with Progress(f"unpacking {path.name}", unit="files") as shown:
        links = []
        for member in _zip_members(path, budget) if is_zip else _tar_members(path):
            budget.count_member()
            target = folder / _safe_name(path, member.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if member.source is None:
                links.append((target, member))
                continue
            with member.source as source, open(target, "wb") as file:
                while chunk := source.read(CHUNK):
                    budget.count_bytes(len(chunk))
                    file.write(chunk)
            shown.update()
    # Links are made last, so that nothing is written through one.
    for link, member in links:
        if member.is_hard:
            os.link(folder / _safe_name(path, member.target), link)
        else:
            link.symlink_to(member.target)
    for link, member in links:
        if not link.resolve().is_relative_to(folder.resolve()):
            raise _outside(path, f"{member.name} -> {member.target}")


class _Member(NamedTuple):
    """A file in an archive, or a link to `target`."""

    name: str
    source: IO[bytes] | None
    target: str = ""
    is_hard: bool = False


class _Budget:
    """Counts what is actually unpacked. Raises: UserError for more than a folder of images can need."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.path, self.folder = path, folder
        self.num_bytes = self.num_members = 0
        self.most = max(MIN_BOMB_BYTES, MAX_RATIO * path.stat().st_size)
        self.free = shutil.disk_usage(folder).free - SPARE_BYTES

    def count_member(self) -> None:
        self.num_members += 1
        if self.num_members > MAX_MEMBERS:
            raise UserError(f"{self.path} has more than {MAX_MEMBERS:,} files; it was not unpacked")

    def count_bytes(self, count: int) -> None:
        self.num_bytes += count
        self.check(self.num_bytes)

    def check(self, num_bytes: int) -> None:
        if num_bytes > self.most:
            raise UserError(
                f"{self.path} unpacks to more than {MAX_RATIO} times its size, unlike archives of images; it "
                "was not unpacked; if you trust it, unpack it and pass the folder"
            )
        if num_bytes > self.free:
            raise UserError(
                f"no space left to unpack {self.path} into {cache_folder()}; free some space, or set "
                "HF_CIFAR_CACHE to a folder on another disk"
            )


def _zip_members(path: Path, budget: _Budget) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.flag_bits & 1 for member in members):
            raise UserError(
                f"{path} is encrypted; unpack it with its password, and pass the folder"
            )
        budget.check(sum(member.file_size for member in members))
        for member in members:
            name = _zip_name(member)
            if stat.S_ISLNK(member.external_attr >> 16):
                yield _Member(name, None, os.fsdecode(archive.read(member)[:4096]))
            elif not name.endswith("/"):
                yield _Member(name, archive.open(member))


def _zip_name(member: zipfile.ZipInfo) -> str:
    """The name of a member. Some programs write UTF-8 without saying so, or backslashes between folders."""
    name = member.filename
    if not member.flag_bits & 0x800:
        with contextlib.suppress(ValueError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


def _tar_members(path: Path) -> Iterator[_Member]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.issym() or member.islnk():
                yield _Member(member.name, None, member.linkname, member.islnk())
            elif member.isfile():
                yield _Member(member.name, archive.extractfile(member))


def _safe_name(path: Path, name: str) -> str:
    """The name of a member below the folder. Raises: UserError if it would land outside."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if (
        posix.is_absolute()
        or windows.drive
        or windows.root
        or ".." in {*posix.parts, *windows.parts}
    ):
        raise _outside(path, name)
    return name


def _outside(path: Path, name: str) -> UserError:
    return UserError(
        f"{path} contains {one_line(name)}, which points outside its folder; it was not unpacked"
    )
