"""Objects in place of names: a data set or model in memory as the value of an option, with a fingerprint.

Imports no torch: the caller has already imported the library that made the object.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from hf_cifar.errors import UserError

MEMORY = "memory/"
MAX_ROWS = 1000  # of a data set, evenly spread, that its fingerprint covers
MAX_STREAMED = 4  # the same for a stream, from its beginning


class InMemory(str):
    """The name of an object that is an option's value: `memory/CLASS-FINGERPRINT`. value: the object."""

    value: Any


def named(value: Any) -> str:
    """Return a name or path as a string; for any other object, return an `InMemory` that holds it."""
    if isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    digest = hashlib.sha256()
    _add(digest, value)
    first = value[0] if isinstance(value, tuple) and value else value
    name = InMemory(f"{MEMORY}{type(first).__name__}-{digest.hexdigest()[:16]}")
    name.value = value
    return name


def kind_of(name: str) -> str:
    """Return the name of an object without its fingerprint; return other names unchanged."""
    return name.rpartition("-")[0] if name.startswith(MEMORY) else name


def require_object(name: str, what: str) -> None:
    """Raises: UserError for the name of an object of another process. what: "model" or "data set"."""
    if name.startswith(MEMORY) and not isinstance(name, InMemory):
        raise UserError(
            f"the {what} of this run, {name}, was a Python object, which cannot be loaded from a file; pass "
            "the same object in Python"
        )


def _add(digest: Any, value: Any) -> None:
    """Add what identifies a value to a digest: types, shapes and contents; of data, those of some rows."""
    digest.update(f"{type(value).__name__}\0".encode())
    if isinstance(value, (bytes, bytearray)):
        digest.update(value)
    elif isinstance(value, (str, int, float, type(None))):
        digest.update(repr(value).encode())
    elif hasattr(value, "named_parameters"):  # a torch.nn.Module
        _add(digest, value.state_dict())
    elif hasattr(value, "to_json_string"):  # an image processor
        digest.update(value.to_json_string().encode())
    elif isinstance(value, Mapping):  # columns, splits, weights
        for key, item in value.items():
            _add(digest, str(key))
            _add(digest, item)
    elif hasattr(value, "numpy") and hasattr(
        value, "detach"
    ):  # a tensor, of types that NumPy lacks too
        flat = value.detach().cpu().contiguous()
        digest.update(f"{flat.dtype} {tuple(flat.shape)}\0".encode())
        import torch

        digest.update(flat.reshape(-1).view(torch.uint8).numpy())
    elif hasattr(value, "tobytes"):  # an array or a picture
        shape = getattr(value, "shape", None) or getattr(value, "size", None)
        digest.update(f"{getattr(value, 'dtype', None) or value.mode} {shape}\0".encode())
        digest.update(value.tobytes())
    else:
        _add_rows(digest, value)


def _add_rows(digest: Any, value: Any) -> None:
    if hasattr(value, "iloc"):  # a pandas.DataFrame
        rows = value.iloc[_spread(len(value))].to_dict("list")
        _add(digest, {"rows": len(value), **rows})
    elif hasattr(value, "features") and hasattr(value, "with_format"):  # of the library `datasets`
        digest.update(str(value.features).encode())
        if hasattr(value, "num_rows"):
            rows = value.with_format("arrow")[_spread(len(value))].to_pylist()
            digest.update(repr((len(value), rows)).encode())
        else:
            for row in value.decode(False).take(MAX_STREAMED):
                _add(digest, row)
    elif hasattr(value, "__getitem__") and hasattr(value, "__len__"):
        digest.update(repr(len(value)).encode())
        for row in _spread(len(value)):
            _add(digest, value[row])
    else:
        raise UserError(
            f"a {type(value).__name__} is neither a data set nor a model; pass a name, a datasets.Dataset, "
            "images with labels, or a model"
        )


def _spread(num_rows: int) -> list[int]:
    """Return up to MAX_ROWS row numbers, evenly spread."""
    count = min(num_rows, MAX_ROWS)
    return [i * num_rows // count for i in range(count)]
