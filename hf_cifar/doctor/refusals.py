"""Collect everything that would make training refuse to start, instead of stopping at the first."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from hf_cifar.audit.findings import Finding
from hf_cifar.errors import UserError

PACKAGE = "hf_cifar"


class Refusals:
    """Error messages, each once, as `hf-cifar finetune` words them. warnings: those that were logged."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.warnings: list[str] = []

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note a refusal of the block, instead of raising it."""
        try:
            yield
        except UserError as error:
            self.add(str(error))

    def add(self, message: str) -> None:
        """Note a message."""
        if message not in self.messages:
            self.messages.append(message)

    @contextlib.contextmanager
    def hearing(self) -> Iterator[None]:
        """Note the warnings that the package logs in the block."""
        listener, logger = _Listener(self.warnings), logging.getLogger(PACKAGE)
        logger.addHandler(listener)
        try:
            yield
        finally:
            logger.removeHandler(listener)

    @property
    def findings(self) -> list[Finding]:
        """The refusals as errors, and the warnings."""
        found = [Finding("error", "refused", message) for message in self.messages]
        heard = [Finding("warning", "log", text) for text in dict.fromkeys(self.warnings)]
        return found + heard


class _Listener(logging.Handler):
    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())
