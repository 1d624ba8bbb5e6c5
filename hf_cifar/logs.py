"""What is printed: one-line notes of this package, and errors of libraries."""

from __future__ import annotations

import logging
import warnings


def quieten(main_process: bool) -> None:
    """Let the libraries report errors only, and this package its one-line notes in the main process."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    # It reports its search for CUDA.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    show_notes(main_process)


def show_notes(main_process: bool) -> None:
    """Let this package print its one-line notes, in the main process only."""
    logging.getLogger("hf_cifar").setLevel(logging.INFO if main_process else logging.ERROR)
