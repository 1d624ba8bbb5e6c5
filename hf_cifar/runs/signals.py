"""Signals that end a run at a safe point."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(KeyboardInterrupt):
    """Raised when a signal stops the process, which exits with status 128 plus the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """A signal recorded during a critical section: a training step, a save, the end of a run.

    number: the first signal, 0 for none. A second one stops at once.
    """

    def __init__(self) -> None:
        self.number = 0

    def note(self, number: int, frame: object = None) -> None:
        """Record a signal. Raises: Stopped, if it is the second."""
        if self.number:
            raise Stopped(number)
        self.number = number

    def raise_if_requested(self) -> None:
        """Raises: Stopped, if a signal was recorded."""
        if self.number:
            raise Stopped(self.number)


@contextlib.contextmanager
def deferred_signals() -> Iterator[StopRequest]:
    """Record SIGTERM and SIGINT during a critical section; the caller raises them when it is safe to stop."""
    request = StopRequest()
    with handled_signals(request.note, *STOP_SIGNALS):
        yield request


@contextlib.contextmanager
def handled_signals(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    """Install a signal handler until the block ends. Does nothing outside the main thread, which cannot."""
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
    """Handle a signal outside critical sections. Raises: Stopped."""
    raise Stopped(number)
