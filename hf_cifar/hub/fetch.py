"""Fetch files from the Hub and check them against the Hub's hashes."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path

from hf_cifar.errors import UserError

# The cache names a file by the Hub's hash: Git's SHA-1 of a small file, the SHA-256 of an LFS file.
SHA1_LENGTH, SHA256_LENGTH = 40, 64


def fetch(repo_id: str, file: str, *, kind: str = "model", revision: str = "main") -> Path:
    """Fetch a file of a repository from the cache or the Hub; a damaged file is fetched again, once.

    kind: "model" or "dataset". Raises: UserError if the file is still damaged; huggingface_hub's own errors
    otherwise.
    """
    from huggingface_hub import constants, hf_hub_download

    for again in (False, True):
        path = Path(hf_hub_download(repo_id, file, repo_type=kind, revision=revision))
        if not is_damaged(path):
            return path
        where = f"{file} of {repo_id} in the cache is damaged: its hash differs from the Hub's"
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{where}; unset HF_HUB_OFFLINE to fetch it again, or delete {path}")
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


def is_damaged(path: Path) -> bool:
    """True if a cached file's hash differs from its name in the cache; False if that name is not a hash."""
    try:
        expected = Path(os.readlink(path)).name
    except OSError:  # a cache without symbolic links does not store the hash
        return False
    if not re.fullmatch(r"[0-9a-f]+", expected):
        return False
    if len(expected) == SHA256_LENGTH:
        digest = hashlib.sha256
    elif len(expected) == SHA1_LENGTH:
        header = b"blob %d\0" % path.stat().st_size
        digest = functools.partial(hashlib.sha1, header)
    else:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, digest).hexdigest() != expected


def discard(path: Path) -> None:
    """Delete a cached file and its link, if another process has not done so."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
