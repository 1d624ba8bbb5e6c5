"""Options of what takes several runs."""

from __future__ import annotations

from dataclasses import dataclass

from hf_cifar.config.fields import option


@dataclass(frozen=True)
class ReproduceConfig:
    """Where a run is made again, and whether on other data."""

    _argument_group_name = "reproduction"

    output_dir: str | None = option(
        None, "Folder of the new run; that of the old one with -reproduced behind it if not given."
    )
    other_data: bool = option(
        False, "Go on although rows, labels or pixels are not what they were."
    )
