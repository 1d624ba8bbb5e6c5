"""Files from the Hub: what does not have the hash that the Hub gives it is not read."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from pathlib import Path

from hf_cifar.errors import UserError

# The cache names a file by what the Hub says of it: Git's SHA-1 of a small one, the SHA-256 of an LFS file.
SHA1_LENGTH, SHA256_LENGTH = 40, 64


def fetch(repo_id: str, file: str, *, kind: str = "model", revision: str = "main") -> Path:
    """A file of a repository, from the cache or the Hub; fetched again, once, if it is damaged.

    kind: "model" or "dataset". Raises: UserError if it is damaged still; huggingface_hub's errors for all
    other reasons.
    """
    from huggingface_hub import constants, hf_hub_download

    for again in (False, True):
        path = Path(hf_hub_download(repo_id, file, repo_type=kind, revision=revision))
        if not is_damaged(path):
            return path
        where = f"{file} of {repo_id} in the cache is damaged, its hash is not the Hub's"
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"{where}; unset HF_HUB_OFFLINE to fetch it again, or remove {path}")
        if again:
            break
        try:
            discard(path)
        except OSError as error:
            raise UserError(f"{where}, and it cannot be removed ({error}); remove {path}") from None
    discard(path)
    raise UserError(
        f"{file} of {repo_id} arrived damaged twice: its hash is not the Hub's; try again, or look at your "
        "proxy or mirror"
    )


def is_damaged(path: Path) -> bool:
    """Whether a file in the cache has another hash than its name there; False where that is no hash."""
    try:
        expected = Path(os.readlink(path)).name
    except OSError:  # a cache without links keeps no names
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
    """Remove a file from the cache, and its link; another process may have done so."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
