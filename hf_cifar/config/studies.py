"""Options of commands about multiple runs."""

from __future__ import annotations

from dataclasses import dataclass

from hf_cifar.config.fields import check_fields, option


@dataclass(frozen=True)
class ReproduceConfig:
    """Where to rerun a run, and on which data."""

    _argument_group_name = "reproduction"

    output_dir: str | None = option(
        None, "Folder of the new run; default: the run's folder plus -reproduced."
    )
    other_data: bool = option(False, "Continue even if rows, labels or pixels have changed.")


@dataclass(frozen=True)
class ListConfig:
    """How to list runs."""

    _argument_group_name = "list"

    json: bool = option(False, "Print a JSON record per line instead of a table.")


@dataclass(frozen=True)
class KFoldConfig:
    """How to cross-validate."""

    _argument_group_name = "cross-validation"

    folds: int = option(
        5, "Number of folds; each is validation of one run, which trains on the others.", low=2
    )

    def __post_init__(self) -> None:
        check_fields(self)
