"""Text for people: lines, lists and tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any


def one_line(value: Any, limit: int | None = None) -> str:
    """The value as text in one line, of at most `limit` characters; an error without text by its type."""
    text = " ".join(str(value).split())[:limit]
    return text or (type(value).__name__ if isinstance(value, Exception) else "")


def first_line(error: Exception) -> str:
    """The first line of an error's text; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def listed(values: Iterable[Any], limit: int | None = None) -> str:
    """Values as part of a sentence: the first `limit` of them, and how many more there are."""
    words = [one_line(value) for value in values]
    more = len(words) - len(words[:limit])
    return ", ".join(words[:limit]) + (f" and {more:,} more" if more else "")


def nearest_hint(name: str, known: Iterable[str], prefix: str = "") -> str:
    """` (nearest: NAME)` if one of the known names is near to `name`, else nothing; for error messages."""
    known = list(known)
    # --model is short for --model_name_or_path, --dataset for --dataset_name.
    longer = [other for other in known if other.startswith((f"{name}_name", f"{name}_rate"))]
    matches = longer or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (nearest: {prefix}{matches[0]})" if matches else ""


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table of text: the first `left` columns flush left, the others flush right."""
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
    """Whole numbers in order, those that follow each other as first-last: `3, 17-19`."""
    runs = groupby(enumerate(sorted(numbers)), lambda item: item[1] - item[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ends)
