"""Progress of long work: a bar on a terminal or in a notebook, else a line every ten seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm.auto import tqdm

from hf_cifar.text import duration

logger = logging.getLogger(__name__)
SECONDS = 10  # between two lines

Item = TypeVar("Item")


def in_notebook() -> bool:
    """True in the kernel of a notebook."""
    # Not by `ipykernel`, which ipywidgets, and so tqdm, may import anywhere.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def shows_bars() -> bool:
    """True if bars can be drawn: on a terminal or in a notebook."""
    return in_notebook() or sys.stderr.isatty()


class Progress:
    """Counts the items of some work, and shows count, rate and time left.

    what: the work, as in 'preparing train'. unit: of the items, plural. total: their number, if known.
    bar: show a bar; None: if one can be drawn.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "images",
        *,
        bar: bool | None = None,
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.count = 0
        self._start = self._last = time.monotonic()
        self._bar: tqdm | None = None
        if shows_bars() if bar is None else bar:  # work of an instant needs no bar
            self._bar = tqdm(desc=what, total=total, unit=f" {unit}", leave=False, delay=1)

    def update(self, count: int = 1) -> None:
        """Add to the number of finished items."""
        self.count += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._last >= SECONDS:
            self._last = time.monotonic()
            logger.info(self.line())

    def line(self) -> str:
        """Return one line, such as `preparing train: 3,400 of 40,000 images, 310/s, 2 min left`."""
        rate = self.count / max(1e-9, time.monotonic() - self._start)
        of = "" if self.total is None else f" of {self.total:,}"
        decimals = 0 if rate >= 10 else 1 if rate >= 1 else 2
        line = f"{self.what}: {self.count:,}{of} {self.unit}, {rate:,.{decimals}f}/s"
        if self.total is None or not self.count:
            return line
        return f"{line}, {duration((self.total - self.count) / rate)} left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def progress(
    items: Iterable[Item], what: str, total: int | None = None, unit: str = "images"
) -> Iterator[Item]:
    """Yield the items, and show their progress. total: default: their length, if they have one."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(what, total, unit) as shown:
        for item in items:
            yield item
            shown.update()
