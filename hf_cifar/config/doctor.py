"""Options of doctor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hf_cifar.config.fields import check_fields, option
from hf_cifar.errors import UserError


@dataclass(frozen=True)
class DoctorConfig:
    """Where the findings go, besides the terminal."""

    _argument_group_name = "doctor"

    json: str | None = option(None, "File for the findings as JSON, ending with .json.")
    output: str | None = option(
        None, "File for a page with the findings and their images, ending with .html."
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name, suffix in (("json", ".json"), ("output", ".html")):
            path = getattr(self, name)
            if path is None:
                continue
            if Path(path).suffix.lower() != suffix:
                raise UserError(f"--{name} is {path}; pass a file that ends with {suffix}")
            if Path(path).is_dir():
                raise UserError(f"--{name} {path} is a folder; pass a file")
