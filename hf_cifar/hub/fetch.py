"""Fetch files from the Hub or a mirror, and check them against the hashes that it gives."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_cifar.errors import UserError

logger = logging.getLogger(__name__)

HUB = "https://huggingface.co"  # any other endpoint is a mirror
# The Hub's ETag, by which the cache names a file: Git's SHA-1 of a small file, the SHA-256 of an LFS file. A
# mirror may send another hash, or none.
HUB_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
HASH = re.compile(r"(?<![0-9a-z])[0-9a-f]{32,128}(?![0-9a-z])")


def fetch(repo_id: str, file: str, *, kind: str = "model", revision: str = "main") -> Path:
    """Fetch a file of a repository from the cache or the Hub; a damaged file is fetched again, once.

    kind: "model" or "dataset". A file of a mirror that gives no known hash is accepted if two downloads are
    identical. Raises: UserError if the file is still damaged; huggingface_hub's own errors otherwise.
    """
    from huggingface_hub import constants, hf_hub_download

    before = None
    for again in (False, True):
        path = Path(hf_hub_download(repo_id, file, repo_type=kind, revision=revision))
        etag = etag_of(path)
        if etag is None or matches(path, etag) or _is_accepted(path, etag):
            return path
        if constants.HF_HUB_OFFLINE and not HUB_HASH.fullmatch(etag):
            return path
        where = f"{file} of {repo_id} in the cache is damaged: its hash differs from the Hub's"
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{where}; unset HF_HUB_OFFLINE to fetch it again, or delete {path}")
        content, listed = _sha256(path), listed_hashes(repo_id, file, kind, path)
        if listed is None and HUB_HASH.fullmatch(etag) and constants.ENDPOINT == HUB:
            listed = [etag]
        if listed is not None and any(matches(path, each) for each in listed):
            _accept(path, etag, content)
            return path
        if listed is None and content == before:
            _warn_of(constants.ENDPOINT)
            _accept(path, etag, content)
            return path
        before = content
        if again:
            break
        try:
            discard(path)
        except OSError as error:
            raise UserError(f"{where}, and it cannot be deleted ({error}); delete {path}") from None
    discard(path)
    raise UserError(
        f"{file} of {repo_id} was damaged in two downloads: its hash differs from the Hub's; try again, or "
        "check your proxy or mirror"
    )


def etag_of(path: Path) -> str | None:
    """Return the ETag of a cached file, in lower case; None in a cache without symbolic links."""
    try:
        return Path(os.readlink(path)).name.lower()
    except OSError:
        return None


def matches(path: Path, etag: str) -> bool:
    """Return True if one of the hashes in an ETag is that of the file: of its content, or Git's of a blob."""
    found = set(HASH.findall(etag))
    header = b"blob %d\0" % path.stat().st_size
    digests: dict[int, list[Callable[..., Any]]] = {
        32: [hashlib.md5],
        40: [functools.partial(hashlib.sha1, header), hashlib.sha1],
        64: [hashlib.sha256, functools.partial(hashlib.sha256, header)],
        96: [hashlib.sha384],
        128: [hashlib.sha512],
    }
    for length in {len(each) for each in found}:
        for digest in digests.get(length, []):
            with path.open("rb") as file:
                if hashlib.file_digest(file, digest).hexdigest() in found:
                    return True
    return False


def listed_hashes(repo_id: str, file: str, kind: str, path: Path) -> list[str] | None:
    """Return the hashes of a file in the listing of its repository; None if there is no listing."""
    from huggingface_hub import HfApi, RepoFile

    commit = _repository(path)[1]
    try:
        entries = HfApi().get_paths_info(repo_id, [file], revision=commit, repo_type=kind)
        files = [each for each in entries if isinstance(each, RepoFile)]
        hashes = [each.lfs.sha256 if each.lfs else each.blob_id for each in files]
    except (
        Exception
    ):  # the client raises its own, httpx's and OS errors, and others for odd responses
        return None
    return [each for each in hashes if each] or None


@functools.cache
def _warn_of(endpoint: str) -> None:
    logger.warning(
        "%s gives no known hash of its files; each is downloaded twice, and used if both downloads are equal",
        endpoint,
    )


def _repository(path: Path) -> tuple[Path, str]:
    """Return the folder of a repository in the cache, and the commit of one of its files."""
    above = next(parent for parent in path.parents if parent.parent.name == "snapshots")
    return above.parents[1], above.name


def _accepted(path: Path, etag: str) -> Path:
    """Return the file beside a repository's blobs that records the content accepted for an ETag."""
    return _repository(path)[0] / ".accepted" / etag


def _is_accepted(path: Path, etag: str) -> bool:
    record = _accepted(path, etag)
    return record.is_file() and record.read_text() == _sha256(path)


def _accept(path: Path, etag: str, content: str) -> None:
    """Record that a file was accepted in spite of its ETag, for later runs, also offline."""
    record = _accepted(path, etag)
    with contextlib.suppress(OSError):  # a read-only cache
        record.parent.mkdir(exist_ok=True)
        record.write_text(content)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def discard(path: Path) -> None:
    """Delete a cached file and its link, if another process has not done so."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
