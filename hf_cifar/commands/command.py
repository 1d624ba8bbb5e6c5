"""What subcommands share: help, folders, models and images that are looked for first, quiet libraries."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_cifar.config.data import DataConfig
from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.config.model import BUNDLED, SCRATCH
from hf_cifar.errors import UserError
from hf_cifar.models.names import check_model_name

if TYPE_CHECKING:
    from hf_cifar.data.splits import DataSource


def wants_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return "-h" in argv or "--help" in argv


def one_run(command: str, folders: Sequence[str]) -> Path:
    """The folder that a command is about. Raises: UserError for none, or several."""
    if len(folders) != 1:
        raise UserError(f"{command} takes the folder of one run, not {len(folders)}")
    return Path(folders[0])


def require_model(config: EvaluateConfig | PredictConfig) -> None:
    """Raises: UserError unless the options name a fine-tuned model that is there."""
    name = config.model_name_or_path
    if not name:
        raise UserError("--model_name_or_path is missing; pass the folder of a run, or a Hub id")
    if name.startswith((SCRATCH, BUNDLED)):
        raise UserError(f"{name} is not fine-tuned yet; pass the folder of a run, or a Hub id")
    check_model_name(
        name,
        config.model_revision,
        trust_remote_code=config.trust_remote_code,
        purpose="the folder of a run",
    )


def check_images(data: DataConfig, splits: Sequence[str]) -> DataSource:
    """Load and decode the splits that a command needs; returns the source that holds them."""
    from hf_cifar.data.split import require_readable
    from hf_cifar.data.splits import DataSource

    source = DataSource(data)
    parts = [
        source.test_split if name == "test" else getattr(source.splits, name) for name in splits
    ]
    require_readable(*parts, pixel_store=data.pixel_store)
    return source


def is_main_process() -> bool:
    """Whether this is the first of all processes, by the launcher's environment."""
    return os.environ.get("RANK", "0") == "0"


def quieten(main_process: bool) -> None:
    """Let the libraries report errors alone, and this package its one-line notes on the main process."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # its search for CUDA
    logging.getLogger("hf_cifar").setLevel(logging.INFO if main_process else logging.ERROR)
