"""Tables of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby


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
