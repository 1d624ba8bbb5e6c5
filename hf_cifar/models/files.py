"""Fetch and check the files of a saved model before any library reads them. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hf_cifar.errors import UserError
from hf_cifar.hub.fetch import fetch
from hf_cifar.hub.reach import looks_like_path, require_network
from hf_cifar.models.names import WEIGHT_SUFFIXES, check_code_is_pinned, hub_errors
from hf_cifar.text import listed

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
REJECT = "reject.safetensors"  # of a model that rejects images, see `models.distance`
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
PICKLE, PICKLES = "pytorch_model.bin", "pytorch_model*.bin"  # whole, or in shards
# Tensors that share memory are copied, as the format demands. A shell does not change it in double quotes.
CONVERSION = (
    "import sys, pathlib, torch; from safetensors.torch import save_file; f = pathlib.Path(sys.argv[1]); "
    "save_file({k: v.contiguous().clone() for p in sorted(f.glob('pytorch_model*.bin')) for k, v in "
    "torch.load(p, map_location='cpu', weights_only=True).items()}, f / 'model.safetensors', "
    "{'format': 'pt'})"
)
MAX_NUMBER = 2**18  # far above any width, depth or number of classes of an image classifier


def model_folder(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    """The folder of a model's files, fetched from the Hub if necessary.

    Raises: UserError for files that are missing, damaged or not plain data, or code that may not run.
    """
    check_code_is_pinned(name, revision, trust_remote_code)
    if looks_like_path(name):
        folder = Path(name).expanduser()
    else:
        folder = _fetch_model(name, revision or "main", trust_remote_code)
    for file in (CONFIG, *PROCESSOR_FILES):
        if (folder / file).is_file():
            _check_values(read_object(folder / file), folder / file, trust_remote_code)
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if module := config.get("module_class"):
        raise UserError(
            f"{name} is a {module}, a torch.nn.Module without a config; create it in Python, and "
            f"load its weights with load_state_dict(safetensors.torch.load_file('{folder / WEIGHTS}'))"
        )
    return folder


def _fetch_model(name: str, revision: str, trust_remote_code: bool) -> Path:
    """Fetch the required files of a Hub model, all from one commit."""
    from huggingface_hub import snapshot_download

    require_network(f"model {name}")
    with hub_errors(name, revision):
        folder = fetch(name, CONFIG, revision=revision).parent
        commit = folder.name
        for file in PROCESSOR_FILES:
            fetch_if_present(name, file, commit)
        if fetch_if_present(name, WEIGHTS, commit) is None:
            index = fetch_if_present(name, INDEX, commit)
            if index is None:
                raise UserError(_no_weights(folder, name, commit))
            for shard in _shards(index):
                fetch(name, shard, revision=commit)
        if read_object(folder / CONFIG).get("reject"):
            fetch(name, REJECT, revision=commit)
        if trust_remote_code:
            snapshot_download(name, revision=commit, allow_patterns="*.py")
            for path in folder.rglob("*.py"):
                fetch(name, path.relative_to(folder).as_posix(), revision=commit)
    return folder


def fetch_if_present(name: str, file: str, commit: str) -> Path | None:
    """Fetch a file of a Hub model; None if the model does not have it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return fetch(name, file, revision=commit)
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
            raise  # the Hub did not answer
        return None


def weight_files(folder: Path) -> list[Path]:
    """List a model's weight files. Raises: UserError unless they are safetensors files."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(_no_weights(folder))
    return [folder / shard for shard in _shards(folder / INDEX)]


def count_weights(folder: Path) -> int:
    """Count the numbers in a model's weights, reading only the file headers."""
    count = 0
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="numpy") as file:
                for tensor in file.keys():  # noqa: SIM118  not a mapping
                    count += math.prod(file.get_slice(tensor).get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read the weights in {path}: {error}") from None
    return count


def _no_weights(folder: Path, name: str = "", commit: str = "") -> str:
    """Explain that a model has no safetensors file, and how to make one from a pickle if there is one.

    folder: of the model, in the cache if it is `name` on the Hub, at `commit`.
    """
    from huggingface_hub import constants

    problem = f"no file named {WEIGHTS} in {name or folder}"
    elsewhere = ", or pass a --model_revision that has it (often refs/pr/N)" if name else ""
    if missing := _missing_shards(folder):
        return (
            f"{problem}, and {PICKLE}.index.json lists {listed(missing, 3)}, which is missing too"
        )
    if any(folder.glob(PICKLES)):
        return (
            f"{problem}, only a pickle, which can run any code and is not read; convert it with: "
            f"{_conversion(folder)}{elsewhere}"
        )
    if name and not constants.HF_HUB_OFFLINE:
        fetch_first = f"hf download {name} --revision {commit} --include '{PICKLES}'"
        return (
            f"{problem}; a {PICKLE} is a pickle, which can run any code and is not read; convert it with: "
            f"{fetch_first} && {_conversion(folder)}{elsewhere}"
        )
    others = sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    found = f"; found {listed(others, 3)}, which is not read" if others else ""
    return f"{problem}{found}; save the model with save_pretrained{elsewhere}"


def _missing_shards(folder: Path) -> list[str]:
    """Names of the pickled shards that an index lists and the folder lacks."""
    index = folder / f"{PICKLE}.index.json"
    names = _listed(index) if index.is_file() else []
    return [name for name in names if not (folder / name).is_file()]


def _conversion(folder: Path) -> str:
    """A shell command that converts the pickled weights in a folder to safetensors, without running any code
    that they may hold."""
    quoted = shlex.quote if os.name == "posix" else lambda path: subprocess.list2cmdline([path])
    return f'python -c "{CONVERSION}" {quoted(str(folder.absolute()))}'


def _shards(index: Path) -> list[str]:
    """Names of the files in an index. Raises: UserError for other files than safetensors next to it."""
    names = _listed(index)
    if not names or any(Path(n).name != n or not n.endswith(".safetensors") for n in names):
        raise UserError(f"{index} must list only .safetensors files in its own folder; fix it")
    return names


def _listed(index: Path) -> list[str]:
    """Names of the files in an index of shards."""
    shards = read_object(index).get("weight_map")
    return sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object. Raises: UserError if it does not."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not a valid JSON file ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"'{path}' contains a {type(values).__name__}; it must contain an object")
    return values


def _check_values(values: dict[str, Any], path: Path, trust_remote_code: bool) -> None:
    """Raises: UserError for an implausible number, or a reference to code in another repository."""
    for key, value in _entries(values):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and abs(value) > MAX_NUMBER:
            raise UserError(
                f"{path}: {key} is {str(value)[:20]}; it must not exceed {MAX_NUMBER:,}"
            )
        if trust_remote_code and key == "auto_map" and "--" in str(value):
            raise UserError(
                f"{path}: the code is in another repository, where it may change; copy it into the folder"
            )
        if key.endswith("_implementation") and "/" in str(value) and not trust_remote_code:
            raise UserError(
                f"{path}: {key} requires code from {value}; review it, then pass --trust_remote_code"
            )


def _entries(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each key of nested objects with its value, and with each item of a list."""
    pending: list[tuple[str, Any]] = list(values.items())
    while pending:
        key, value = pending.pop()
        yield key, value
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
