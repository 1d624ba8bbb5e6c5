"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from hf_cifar.errors import UserError


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or report which extra of hf_cifar installs it.

    Raises: UserError if the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise UserError(
            f"{module} is not installed; run: pip install 'hf-cifar[{extra}]'"
        ) from None
