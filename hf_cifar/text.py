"""Format text for people: lines, lists and tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any


def one_line(value: Any, limit: int | None = None) -> str:
    """Format a value on one line of at most `limit` characters; an error without a message as its type."""
    text = " ".join(str(value).split())[:limit]
    return text or (type(value).__name__ if isinstance(value, Exception) else "")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(values: Iterable[Any], limit: int | None = None) -> str:
    """List values in a sentence: the first `limit` of them, and how many more there are."""
    words = [one_line(value) for value in values]
    more = len(words) - len(words[:limit])
    return ", ".join(words[:limit]) + (f" and {more:,} more" if more else "")


def enumerated(values: Sequence[str]) -> str:
    """Join words as in a sentence: `a, b and c`."""
    return " and ".join([", ".join(values[:-1]), *values[-1:]][len(values) < 2 :])


def nearest(name: str, known: Iterable[str], similarity: float = 0.5) -> str | None:
    """Return the known name that is most similar to a misspelled one, or None. similarity: 0..1."""
    return next(iter(difflib.get_close_matches(name, list(known), 1, similarity)), None)


def nearest_hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Suggest ` (nearest: NAME)` in an error message if one of the known names is similar, else nothing."""
    found = nearest(name, known)
    return f" (nearest: {prefix}{found})" if found else ""


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Format a text table: the first `left` columns are aligned left, the others right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def render_numbers(numbers: Iterable[int]) -> str:
    """Format sorted integers, with consecutive ones as ranges: `3, 17-19`."""
    runs = groupby(enumerate(sorted(numbers)), lambda item: item[1] - item[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ends)


def duration(seconds: float) -> str:
    """Format a time for people, in two units at most: `8 s`, `1 min 35 s`, `2 h 5 min`."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    if minutes:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{rest} s"


def megabytes(size: int) -> str:
    """Format a number of bytes in megabytes."""
    return f"{size / 1e6:,.3f} MB"
