"""The options of a run that may be published."""

from __future__ import annotations

import dataclasses
import re
from pathlib import PureWindowsPath
from typing import Any

from hf_cifar.config.run import CONFIGS

# Options that say where a run is stored and goes to, not what it computes, or that the card shows elsewhere.
HIDDEN_OPTIONS = {
    each.name
    for config in CONFIGS
    for each in dataclasses.fields(config)
    if not each.metadata["public"]
}
PLAIN = re.compile(r"[\w .,:;=+%(){}\[\]'\"-]*")


def public_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a run that may be published, without folders, addresses and tokens."""
    return {
        name: _public(value)
        for name, value in options.items()
        if value is not None and name not in HIDDEN_OPTIONS and not name.startswith("hub_")
    }


def _public(value: Any) -> Any:
    """Strip folders, addresses and other private text from an option's value."""
    if isinstance(value, dict):
        return {key: _public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public(item) for item in value]
    if isinstance(value, str):
        name = PureWindowsPath(value).name  # splits at slashes and backslashes
        return name if PLAIN.fullmatch(name) else "..."
    return value
