"""Class names that probably mean the same class."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

# A class is probably a misspelling of another one that has at least this many times as many images.
TIMES_MISSPELT = 5


def similar_names(names: Sequence[str]) -> list[list[str]]:
    """Group names that differ only in case, spaces, dashes, underscores or a plural s."""
    groups = defaultdict(list)
    for name in names:
        form = re.sub(r"[\W_]+", "", name.casefold())
        if re.search(r"[^\W\d_]", form):
            form = form[:-1] if form.endswith("s") and len(form) > 3 else form
        else:
            form = name
        groups[form].append(name)
    return [same for same in groups.values() if len(same) > 1]


def misspelt_names(sizes: Mapping[str, int]) -> list[list[str]]:
    """Pair names that are one edit apart, if one has at most a fifth of the other's images.

    An edit is an added, missing or different letter, or two swapped neighbours. Only names with at least
    three letters and without digits are paired. sizes: number of images by name.
    """
    words = [name for name in sizes if len(name) >= 3 and not re.search(r"\d", name)]
    return [
        [name, other]
        for name, other in itertools.combinations(words, 2)
        if TIMES_MISSPELT * min(sizes[name], sizes[other]) <= max(sizes[name], sizes[other])
        and len(similar_names([name, other])) == 0
        and is_one_edit(name.casefold(), other.casefold())
    ]


def shared_start(first: str, second: str) -> int:
    """Return the number of letters at the start that two words share."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in same)


def is_one_edit(first: str, second: str) -> bool:
    """Return True if one letter was added, removed or replaced, or two neighbours were swapped."""
    start = shared_start(first, second)
    end = shared_start(first[start:][::-1], second[start:][::-1])
    one, other = first[start : len(first) - end], second[start : len(second) - end]
    return max(len(one), len(other)) <= 1 or (len(one) == 2 and one == other[::-1])
