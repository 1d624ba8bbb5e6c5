"""Findings about a data set, from surveys of its splits: what is wrong, how bad it is, and what to do.

Nothing here reads images or needs torch. The thresholds were chosen so that CIFAR-10 gives no warning;
docs/studies.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from hf_cifar.audit.class_names import misspelt_names, similar_names
from hf_cifar.audit.duplicates import Duplicate
from hf_cifar.audit.survey import Survey
from hf_cifar.data.labels import SHOWN_CLASSES, class_counts
from hf_cifar.text import listed

Array = np.ndarray
Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")
# Times the median number of pixels above which an image is huge, if it also has so many pixels; an image
# is tiny if its shorter side is below TINY_SIDE and this many times below the median.
HUGE, HUGE_PIXELS, TINY, TINY_SIDE = 100, 1e6, 4, 32
# Longer to shorter side of an image whose edges a crop would lose, if most are not like that.
ELONGATED = 4.0
# A property gives a class away if at least TELLING of its images have it, and at most RARE_ELSEWHERE of the
# others.
TELLING, RARE_ELSEWHERE, FEWEST_TOLD = 0.5, 0.1, 5
FEW_IMAGES = 10  # of a class in train
# Shares of images above which duplicates are a warning. In CIFAR-10, 0.7% of train nearly equals another
# image of train, 1.2% of test one of train, and no image equals another one.
MANY_EXACT, MANY_NEAR, MANY_NEAR_ACROSS = 0.001, 0.01, 0.02


class Example(NamedTuple):
    """An image, or a pair of images, of a finding: the split and position of each, and why."""

    places: tuple[tuple[str, int], ...]
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """Something found: error (training would be refused), warning or note.

    name: the kind of finding. text: what was found. action: what to do; empty if the text says it.
    """

    level: Level
    name: str
    text: str
    action: str = ""
    examples: tuple[Example, ...] = field(default=())


def count_of(number: int, what: str = "image") -> str:
    """Return a number with its noun: `1 image`, `2,000 images`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def of_images(rows: Array, survey: Survey) -> str:
    """Return a share in words: `3 of 200 images of train`."""
    return f"{len(rows):,} of {count_of(len(survey.split))} of {survey.split.name}"


def _verb(rows: Array, one: str = "is", many: str = "are") -> str:
    return one if len(rows) == 1 else many


def examples_of(survey: Survey, rows: Array, notes: Sequence[str] = ()) -> tuple[Example, ...]:
    """Return an example for each position."""
    notes = notes or [""] * len(rows)
    return tuple(
        Example(((survey.split.name, int(row)),), note)
        for row, note in zip(rows.tolist(), notes, strict=True)
    )


def image_findings(survey: Survey) -> Iterator[Finding]:
    """Find images of extreme sizes, blank images, and images whose kind of file differs from most."""
    yield from _sizes(survey)
    yield from _blank(survey)
    good = survey.readable
    deep, grey, alpha = (good[each[good]] for each in (survey.deep, survey.grey, survey.alpha))
    if 0 < len(deep) < len(good):
        yield Finding(
            "warning", "more than 8 bits",
            f"{of_images(deep, survey)} {_verb(deep, 'has', 'have')} more than 8 bits per value, unlike the "
            "others; their values are scaled by one common range",
            "check on the page that both kinds look alike; convert them to 8 bits, or set --value_range",
            examples_of(survey, deep),
        )  # fmt: skip
    elif len(deep):
        yield Finding(
            "note", "more than 8 bits",
            f"all images of {survey.split.name} have more than 8 bits per value, and are scaled to 8",
            "see the range in the log above; --value_range sets another one",
        )  # fmt: skip
    if 0 < len(grey) < len(good):
        yield Finding(
            "note", "grey images",
            f"{of_images(grey, survey)} {_verb(grey)} grey, and the others are in colour",
            "nothing to do, unless the model will see only one kind of image; then convert all to that kind",
            examples_of(survey, grey),
        )  # fmt: skip
    if len(alpha):
        yield Finding(
            "note", "alpha channel",
            f"{of_images(alpha, survey)} {_verb(alpha, 'has', 'have')} an alpha channel; transparent "
            "parts become white",
            "paste them onto another background if white is unsuitable",
            examples_of(survey, alpha),
        )  # fmt: skip


def _sizes(survey: Survey) -> Iterator[Finding]:
    good = survey.readable
    if not len(good):
        return
    size = survey.size[good]
    pixels, shorter = size.prod(axis=1), size.min(axis=1)
    ratio = size.max(axis=1) / np.maximum(1, shorter)
    kinds = {
        "huge": (pixels >= HUGE * np.median(pixels)) & (pixels >= HUGE_PIXELS),
        "tiny": (shorter < TINY_SIDE) & (shorter * TINY <= np.median(shorter)),
        "elongated": (ratio >= ELONGATED) & (np.median(ratio) < ELONGATED / 2),
    }
    actions = {
        "huge": "check that each is one image and not a scan of many; scale them down, which also saves time",
        "tiny": "remove thumbnails and icons, or find the originals",
        "elongated": "crop them yourself, or pass --resize_mode pad, which keeps the whole image",
    }
    middle = "{1} x {0}".format(*np.median(size, axis=0).astype(int))
    for kind, mask in kinds.items():
        if not mask.any():
            continue
        rows = good[mask]
        sizes = ["{1} x {0} px".format(*each) for each in survey.size[rows].tolist()]
        yield Finding(
            "warning", f"{kind} images",
            f"{of_images(rows, survey)} {_verb(rows)} {kind} ({listed(sizes, 3)}); the "
            f"median is {middle} px",
            actions[kind], examples_of(survey, rows, sizes),
        )  # fmt: skip


def _blank(survey: Survey) -> Iterator[Finding]:
    rows = np.flatnonzero(survey.blank)
    if not len(rows):
        return
    text = f"{of_images(rows, survey)} {_verb(rows)} blank (a single colour)"
    labels, names = survey.split.labels, survey.split.id2label
    if labels.ndim == 1:
        total, blank = (class_counts(each, len(names)) for each in (labels, labels[rows]))
        most = [names[k] for k in np.flatnonzero((blank > total / 2) & (total > 0)).tolist()]
        text += f"; most images of class {listed(most, SHOWN_CLASSES)} are" if most else ""
    yield Finding(
        "warning", "blank images", text, "remove them, or replace them with the originals",
        examples_of(survey, rows),
    )  # fmt: skip


def telling_properties(survey: Survey) -> Iterator[Finding]:
    """Find classes that a property of their files gives away, which a model will learn instead."""
    labels, names, good = survey.split.labels, survey.split.id2label, survey.readable
    if labels.ndim != 1:
        return
    total = class_counts(labels[good], len(names))
    for words, mask in {
        "are grey": survey.grey, "have an alpha channel": survey.alpha,
        "have more than 8 bits": survey.deep, "are larger than the others": _larger(survey),
    }.items():  # fmt: skip
        has = class_counts(labels[good[mask[good]]], len(names))
        others = (has.sum() - has) / np.maximum(1, total.sum() - total)
        share = has / np.maximum(1, total)
        told = (share >= TELLING) & (others <= RARE_ELSEWHERE) & (has >= FEWEST_TOLD)
        for label in np.flatnonzero(told).tolist():
            rows = good[mask[good] & (labels[good] == label)]
            yield Finding(
                "warning", "class given away by its files",
                f"train: {share[label]:.0%} of class {names[label]!r} {words}, and {others[label]:.0%} of "
                "the other images; a model will learn that instead of what the images show",
                "make the files of all classes alike, for example by converting all of them in the same way",
                examples_of(survey, rows),
            )  # fmt: skip


def _larger(survey: Survey) -> Array:
    pixels = survey.size.prod(axis=1)
    return (
        pixels > 4 * max(1.0, float(np.median(pixels[survey.readable])))
        if len(pixels)
        else pixels > 0
    )


def class_findings(train: Survey, validation: Survey) -> Iterator[Finding]:
    """Find classes with few images, without validation images, and with almost the same name."""
    split, names = train.split, train.split.id2label
    counts = class_counts(split.labels, len(names))  # unreadable ones too: they will be fixed
    few = [f"{names[k]} ({counts[k]})" for k in np.flatnonzero(counts < FEW_IMAGES).tolist()]
    if few:
        yield Finding(
            "warning", "few images",
            f"train: {len(few)} of {len(names)} classes have fewer than {FEW_IMAGES} images: "
            f"{listed(few, SHOWN_CLASSES)}",
            "add images, or merge or remove these classes",
        )  # fmt: skip
    held = class_counts(validation.split.labels, len(names))
    missing = [names[k] for k in np.flatnonzero(held == 0).tolist()]
    if missing:
        yield Finding(
            "warning", "not in validation",
            f"validation: {len(missing)} of {len(names)} classes have no images, so nothing is measured for "
            f"them: {listed(missing, SHOWN_CLASSES)}",
            "add images of them to validation, or pass a larger --train_val_split",
        )  # fmt: skip
    sizes = {name: int(counts[k]) for k, name in names.items()}
    for same in [*similar_names(list(sizes)), *misspelt_names(sizes)]:
        ids = [label for label, name in names.items() if name in same]
        listing = " and ".join(f"{names[k]!r} ({count_of(int(counts[k]))})" for k in ids)
        yield Finding(
            "warning", "similar class names",
            f"classes {listing} have almost the same name, and are separate classes",
            "merge their folders or labels if they are one class",
        )  # fmt: skip


def duplicate_findings(
    first: Survey, second: Survey, pairs: Sequence[Duplicate], *, compare_labels: bool = True
) -> Iterator[Finding]:
    """Find duplicates within a split, or between `first` and `second`, and duplicates with different labels.

    compare_labels: False for test, of which only pixels are read.
    """
    within, name, other = first is second, first.split.name, second.split.name
    where = f"another image of {name}" if within else f"an image of {other}"
    many_near = MANY_NEAR if within else MANY_NEAR_ACROSS
    for exact, many, words in ((True, MANY_EXACT, ""), (False, many_near, "nearly ")):
        of_kind = [pair for pair in pairs if pair.exact == exact]
        copies = {pair.first for pair in of_kind}
        if not copies:
            continue
        share = len(copies) / max(1, len(first.split))
        level: Level = "warning" if share > many or (exact and not within) else "note"
        action = "remove the copies; otherwise these images count more than others in training"
        if not within:
            action = f"remove them from {other}; otherwise metrics on {name} are too good"
        if not exact:
            action = f"look at the pairs on the page; if they are copies, {action}"
        yield Finding(
            level, f"{'exact' if exact else 'near'} duplicates, {name}" + ("" if within else f" and {other}"),
            f"{len(copies):,} of {count_of(len(first.split))} of {name} {words}"
            f"{'equals' if len(copies) == 1 else 'equal'} {where}",
            action, tuple(_pair(first, second, pair) for pair in of_kind),
        )  # fmt: skip
    if not compare_labels:
        return
    labels, others = first.split.labels, second.split.labels
    different = [p for p in pairs if np.any(labels[p.first] != others[p.second])]
    if different:
        exact_ones = sum(pair.exact for pair in different)
        yield Finding(
            "warning", "duplicates with different labels",
            f"{count_of(len(different), 'pair')} of duplicates, {exact_ones:,} of them exact, "
            f"{'has' if len(different) == 1 else 'have'} different labels ({name}"
            + ("" if within else f" and {other}") + ")",
            "at least one label of each pair is wrong, or the image shows both classes: fix or remove them",
            tuple(_pair(first, second, pair) for pair in different),
        )  # fmt: skip


def _pair(first: Survey, second: Survey, pair: Duplicate) -> Example:
    note = "equal" if pair.exact else f"difference {pair.difference:.2f}"
    return Example(((first.split.name, pair.first), (second.split.name, pair.second)), note)
