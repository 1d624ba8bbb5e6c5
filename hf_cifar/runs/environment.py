"""Versions of Python and the packages, and this package's commit."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "hf-cifar",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "evaluate",
    "timm",
    "huggingface_hub",
    "numpy",
    "pillow",
    "scipy",
)


def environment() -> dict[str, str]:
    """Return the versions of Python and the packages, and the commit of a checkout."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _commit()
    return versions | ({"commit": commit} if commit else {})


def _commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with -dirty; None outside a checkout."""
    folder = Path(__file__).parent
    command = [
        "git",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        inside = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__], capture_output=True
        )
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
    except OSError:
        return None
    return done.stdout.strip() if inside.returncode == 0 and done.returncode == 0 else None
