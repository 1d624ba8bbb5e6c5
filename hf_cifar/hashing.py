"""The hash of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

CHUNK = 4 * 1024**2


def file_hash(path: Path, digest: Any = None) -> str:
    """Hexadecimal hash of a file's bytes. digest: of hashlib, begun already or not; default SHA-256."""
    digest = hashlib.sha256() if digest is None else digest
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
