"""Signals that stop a run in good order."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop; it ends with exit status 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Signals that are noted while something must not be cut off: a step, a save, the end of a run.

    number: of the first signal that came, 0 for none. A second one stops at once.
    """

    def __init__(self) -> None:
        self.number = 0

    def note(self, number: int, frame: object = None) -> None:
        if self.number:
            raise Stopped(number)
        self.number = number

    def obey(self) -> None:
        """Raises: Stopped, if a signal came."""
        if self.number:
            raise Stopped(self.number)


@contextlib.contextmanager
def noted_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of obeying them; whoever asks for this obeys where it can."""
    request = StopRequest()
    with handled_signals(request.note, *STOP_SIGNALS):
        yield request


@contextlib.contextmanager
def handled_signals(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """Let a handler have signals until the block ends. They are the main thread's: elsewhere, nothing."""
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:
        before = {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def stop_at_once(number: int, frame: object = None) -> None:
    """A signal handler for everywhere else. Raises: Stopped."""
    raise Stopped(number)
