"""The files that a run needs on Hugging Face Inference Endpoints."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

from hf_cifar.errors import UserError
from hf_cifar.hub.push import files_to_push

HANDLER = Path(__file__).with_name("handler.py")


def endpoint_files(folder: Path) -> dict[str, bytes]:
    """Return handler.py, and requirements.txt for a timm model, by their name in a run's folder.

    Raises: UserError if the folder has another file of that name, or no model that `from_pretrained` loads.
    """
    config = json.loads(files_to_push(folder)["config.json"].read_bytes())
    if module := config.get("module_class"):
        raise UserError(
            f"--handler needs a model that from_pretrained loads, and {folder} has a {module}; leave it out"
        )
    files = {HANDLER.name: HANDLER.read_bytes()}
    if config.get("model_type") == "timm_wrapper":  # the image of an endpoint has transformers only
        files["requirements.txt"] = f"timm=={metadata.version('timm')}\n".encode()
    for name, content in files.items():
        if (folder / name).exists() and (folder / name).read_bytes() != content:
            raise UserError(
                f"{folder / name} differs from the file that --handler writes; leave out --handler to push "
                "it as it is, or remove it"
            )
    return files
