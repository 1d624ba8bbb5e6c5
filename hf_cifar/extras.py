"""Optional dependencies, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from hf_cifar.errors import UserError


def require(module: str, *, extra: str) -> ModuleType:
    """Import `module`, or report which extra of hf_cifar installs its package.

    Raises: UserError if the module is not installed.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise UserError(
            f"{package} is not installed; run: pip install 'hf-cifar[{extra}]'"
        ) from None
    return importlib.import_module(module)
