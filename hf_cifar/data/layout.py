"""Decide from the listing of a folder of images which folders are splits and which are classes.

No image is opened for this, and no name of a file decides.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from hf_cifar.data.labels import form_of, names_by_form
from hf_cifar.data.listing import File, Listing, kind_of, render_left_out
from hf_cifar.errors import UserError
from hf_cifar.text import listed, one_line

SPLIT_WORDS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "eval": "validation", "evaluation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
# Words that the name of a split folder may also contain, as in training_set and TestImages.
SPLIT_FILLERS = {"data", "dataset", "image", "images", "imgs", "photos", "pictures", "set", "split"}
# A single folder in test whose name consists of these words is not a class.
NO_CLASS = {*SPLIT_FILLERS, *SPLIT_WORDS, "all", "unknown", "unlabeled", "unlabelled"}
ORDER = ("train", "validation", "test")
# Kinds of files that lie beside images. A folder with only these is not a class.
DOCUMENTS = {
    ".7z", ".aae", ".arrow", ".bin", ".cfg", ".ckpt", ".csv", ".db", ".doc", ".docx", ".gz", ".h5", ".htm",
    ".html", ".ini", ".ipynb", ".json", ".jsonl", ".lock", ".log", ".md", ".md5", ".ndjson", ".npz",
    ".onnx", ".parquet", ".pkl", ".pt", ".pth", ".py", ".rst", ".safetensors", ".sh", ".sqlite",
    ".tar", ".tfevents", ".toml", ".tsv", ".txt", ".xls", ".xlsx", ".xml", ".xmp", ".yaml", ".yml", ".zip",
}  # fmt: skip
MAX_NAMES = 5  # in a line


class NoClassFolders(UserError):
    """The images are not sorted into one folder per class; a table may name their classes."""


@dataclass(frozen=True)
class Layout:
    """What a folder of images holds.

    splits: the images of each split with their class, or classes. class_names: in the order of their ids.
    labels_from: where the classes come from. left_out: files that are not used, counted by reason;
    rows_left_out: rows of a table. split_names: the original name of each split; empty without splits.
    image_column, label_column: names of the columns of a data set made from this. group_column: of a column
    of groups, if requested, and group_of: the group of each image. notes: decisions that the user may not
    expect, one line each.
    """

    splits: dict[str, list[tuple[File, str | tuple[str, ...]]]]
    class_names: list[str]
    labels_from: str
    left_out: Counter[str] = field(default_factory=Counter)
    rows_left_out: Counter[str] = field(default_factory=Counter)
    split_names: dict[str, str] = field(default_factory=dict)
    image_column: str = "image"
    label_column: str = "label"
    notes: list[str] = field(default_factory=list)
    group_column: str | None = None
    group_of: dict[File, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Describe the layout in one line."""
        count = sum(map(len, self.splits.values()))
        classes = f"{len(self.class_names):,} class{'es' if len(self.class_names) != 1 else ''}"
        parts = [f"{classes} from {self.labels_from}, {count:,} images"]
        if self.split_names:
            named = ", ".join(
                name if name.rstrip("/") == split else f"{name} ({split})"
                for split, name in self.split_names.items()
            )
            parts.append(f"{named} {'are splits' if len(self.split_names) > 1 else 'is a split'}")
        counts = {"file": self.left_out, "row": self.rows_left_out}
        if any(count.total() for count in counts.values()):
            left_out = [
                render_left_out(count, what) for what, count in counts.items() if count.total()
            ]
            parts.append(f"left out: {' and '.join(left_out)}")
        return "; ".join(parts)


def read_layout(listing: Listing, folders: str = "auto", known: Iterable[str] = ()) -> Layout:
    """Decide what the folders of a listing are. folders: auto, classes or splits. known: classes of which
    there may be only one.

    Raises: NoClassFolders if no folder, or not that of train, holds two class folders, or two readings make
    sense; UserError for an image outside the classes, a class that only another split has, or a folder
    without a readable image.
    """
    return _Reader(listing).read(folders, set(known))


class _Reader:
    """Reads one listing. Folders are named with a trailing slash, the root as ""."""

    def __init__(self, listing: Listing) -> None:
        self.root = listing.root
        self.listing = listing
        self.images: dict[str, list[File]] = defaultdict(list)  # by each folder above them
        self.direct: dict[str, list[File]] = defaultdict(list)  # by the folder that holds them
        self.below: dict[str, set[str]] = defaultdict(set)  # names of the folders in it with images
        for file in listing.images:
            parts = file.name.split("/")[:-1]
            self.direct["".join(f"{part}/" for part in parts)].append(file)
            above = ""
            for part in parts:
                self.below[above].add(part)
                above += f"{part}/"
                self.images[above].append(file)
        self.left_out = listing.all_left_out()
        self.notes: list[str] = []

    def read(self, folders: str, known: set[str]) -> Layout:
        inside = self.enter()
        roles = self.roles_of(inside, folders)
        if roles:
            splits, used = self.read_splits(inside, roles)
        else:
            if folders == "auto":
                self.refuse_unlikely_classes(inside)
            splits, used = {"train": self.read_classes(inside)}, {}
        labelled = [splits["train"]] if "train" in splits else splits.values()
        names = sorted({name for classes in labelled for name in classes})
        alone = bool(known) and folders == "classes"  # a class that is added to the known ones
        if len(names) < 2 and not known.issuperset(names) and not alone:
            where = self.show(inside + (f"{used['train']}/" if "train" in used else ""))
            raise NoClassFolders(
                f"{where} has one class folder, {one_line(names[0])}; a classifier needs two or more"
                + (", or pass --folders classes if it is a class to add" if known else "")
            )
        self.warn_of_case(names)
        # Classes of the model that train need not have.
        forms = set(map(form_of, known)) - set(map(form_of, names))
        found = {name for classes in splits.values() for name in classes}
        names += sorted(name for name in found if form_of(name) in forms)
        rows: dict[str, list[tuple[File, str | tuple[str, ...]]]] = {
            split: sorted(
                (file, name)
                for name, files in self.known_classes(
                    classes, names, used.get(split, split)
                ).items()
                for file in files
            )
            for split, classes in splits.items()
        }
        return Layout(
            rows,
            names,
            "folders" + (f" in {one_line(inside)}" if inside else ""),
            self.left_out,
            split_names={split: f"{one_line(name)}/" for split, name in used.items()},
            notes=self.notes,
        )

    def enter(self) -> str:
        """Find the folder that holds all others: a root with nothing but one folder of folders is entered."""
        inside = ""
        while True:
            names = self.below[inside]
            lone = next(iter(names)) if len(names) == 1 else None
            if lone is None or self.direct[inside] or split_roles([lone]):
                return inside
            if self.empty_folders(inside) or self.direct[f"{inside}{lone}/"]:
                return inside
            inside += f"{lone}/"

    def roles_of(self, inside: str, folders: str) -> dict[str, str]:
        """Map the folders that are splits to their splits; empty if the folders are classes.

        Raises: UserError if both readings make sense.
        """
        names = sorted(self.below[inside])
        roles = split_roles(names)
        others = [name for name in names if name not in roles]
        if folders == "classes" or (folders == "auto" and not roles):
            return {}
        if not roles:
            raise UserError(
                f"no folder in {self.show(inside)} is named as a split, only {listed(names, MAX_NAMES)}; "
                "rename them to train, validation and test, or leave out --folders splits"
            )
        tops = {name: f"{inside}{name}/" for name in roles}
        sorted_in = [
            n for n, top in tops.items() if len(self.below[top]) > 1 and not self.direct[top]
        ]
        if others and folders == "auto":
            if len(roles) == 1 and not sorted_in:
                (name,) = roles  # a class that is called train, as in bus, car, train
                if roles[name] == "test" and not self.below[tops[name]]:
                    self.leave_out_unlabelled(
                        tops[name], "; if it is a class, pass --folders classes"
                    )
                return {}
            tops = self.enter_splits(tops, roles)
            classes = {each for top in tops.values() for each in self.below[top]}
            what = f" with the classes {listed(sorted(classes), MAX_NAMES)}" if classes else ""
            raise NoClassFolders(
                f"{self.show(inside)} can be read in two ways: {slashed(roles)} as splits{what}, without "
                f"{slashed(others)}; or {listed(names, MAX_NAMES)} as classes. Pass --folders splits or "
                "--folders classes"
            )
        for name in others:
            count = len(self.images[f"{inside}{name}/"])
            self.left_out[f"in {name}/"] += count
        twice = [name for name in roles if list(roles.values()).count(roles[name]) > 1]
        if twice:
            raise UserError(
                f"{slashed(twice)} in {self.show(inside)} are all named as {roles[twice[0]]}; "
                "merge them, or rename one; if they are classes, pass --folders classes"
            )
        return {name: roles[name] for name in sorted(roles, key=lambda n: ORDER.index(roles[n]))}

    def read_splits(
        self, inside: str, roles: dict[str, str]
    ) -> tuple[dict[str, dict[str, list[File]]], dict[str, str]]:
        """Read the classes of each split. Also returns the folders of the splits that have labels."""
        self.refuse_stray(inside)
        if empty := [name for name in self.empty_folders(inside) if split_roles([name])]:
            self.notes.append(f"{slashed(empty)} in {self.near(inside)}: no images, so not a split")
        tops = self.enter_splits({name: f"{inside}{name}/" for name in roles}, roles)
        splits: dict[str, dict[str, list[File]]] = {}
        for name, split in roles.items():
            found = self.below[tops[name]]
            if split == "train" and not found:
                raise NoClassFolders(
                    f"{self.show(tops[name])} holds {len(self.direct[tops[name]]):,} images and no class "
                    "folders; make one folder per class in it, or pass --labels_file with a table of their "
                    "names and labels"
                )
            # As in test/unknown/1.png: one folder, which is not a class.
            foreign = "train" in splits and len(found) == 1 and not found & set(splits["train"])
            if not found or (foreign and all(set(words_of(name)) <= NO_CLASS for name in found)):
                self.leave_out_unlabelled(tops[name])
            else:
                splits[split] = self.read_classes(tops[name])
        if not splits:
            raise NoClassFolders(
                f"no folder in {self.show(inside)} holds class folders; make one per class"
            )
        return splits, {split: name for name, split in roles.items() if split in splits}

    def enter_splits(self, tops: dict[str, str], roles: dict[str, str]) -> dict[str, str]:
        """Enter train/train and the like, and train/images if every split has nothing but one such folder."""
        for name, top in tops.items():
            while not self.direct[top] and len(self.below[top]) == 1:
                (same,) = self.below[top]
                if same != name and split_roles([same]).get(same) != roles[name]:
                    break
                top += f"{same}/"
            tops[name] = top
        while True:
            labelled = {name: top for name, top in tops.items() if self.below[top]}
            inner = {name for top in labelled.values() for name in self.below[top]}
            deeper = {name: f"{top}{each}/" for name, top in labelled.items() for each in inner}
            if len(inner) != 1 or any(
                self.direct[labelled[name]] or not self.below[top] or self.direct[top]
                for name, top in deeper.items()
            ):
                return tops
            tops = tops | deeper

    def read_classes(self, top: str) -> dict[str, list[File]]:
        """Read the class folders in a folder. Raises: UserError for an image that is in none of them."""
        names = [name for name in self.below[top] if self.images[f"{top}{name}/"]]
        if not names:
            raise NoClassFolders(
                f"the images in {self.show(top)} have no labels; put them into one folder per class, or "
                "pass --labels_file with a table of their names and labels"
            )
        self.refuse_stray(top)
        self.empty_folders(top, warn=True)
        self.note_deeper(top, names)
        return {name: self.images[f"{top}{name}/"] for name in names}

    def refuse_unlikely_classes(self, top: str) -> None:
        """Raises: UserError if folders that would be classes hold the splits, or the classes, themselves."""
        names = sorted(self.below[top])
        inner = {name: self.folders_in(f"{top}{name}/") for name in names}
        inner = {name: found for name, found in inner.items() if len(found[1]) > 1}
        split = {
            name: each
            for name, (_, each) in inner.items()
            if len(roles := split_roles(each)) == len(each) and "train" in roles.values()
        }
        where = self.show(top)
        if len(split) == len(names) > 1:
            raise NoClassFolders(
                f"{slashed(names)} in {where} each hold splits, {slashed(split[names[0]])}; make those the "
                "top folders, with the classes in them, or pass --folders classes to train on all images"
            )
        numbered = len({re.sub(r"\d+", "", name) for name in names}) == 1 < len(names)
        alike = len({tuple(each) for _, each in inner.values()}) == 1 and len(inner) == len(names)
        no_class = {*SPLIT_FILLERS, "labeled", "labelled"}
        fillers = [name for name in inner if set(words_of(name)) <= no_class and words_of(name)]
        if numbered and alike and words_of("".join(inner[names[0]][1])):
            advice = "Merge them into one folder per class, or pass"
        elif (split or fillers) and len(names) > 1:
            names = [*split, *(name for name in fillers if name not in split)]
            advice = f"Pass {self.show(inner[names[0]][0])}, or"
        else:
            return
        raise NoClassFolders(
            f"{where} can be read in two ways: {listed(sorted(self.below[top]), MAX_NAMES)} as classes; or "
            f"{slashed(inner[names[0]][1])} in {slashed(names)} as {'splits' if split else 'classes'}. "
            f"{advice} --folders classes"
        )

    def folders_in(self, top: str) -> tuple[str, list[str]]:
        """Enter folders that hold nothing but one folder; returns the last one, and the folders in it, which
        are none if images lie beside them."""
        while not self.direct[top] and len(self.below[top]) == 1:
            top += f"{next(iter(self.below[top]))}/"
        return top, [] if self.direct[top] else sorted(self.below[top])

    def note_deeper(self, top: str, names: list[str]) -> None:
        """Note the folders below classes, unless each class has nothing but one."""
        deeper: Counter[str] = Counter()
        for name in names:
            for each in self.below[f"{top}{name}/"]:
                deeper[each] += len(self.images[f"{top}{name}/{each}/"])
        if len(deeper) > 1 or any(
            self.direct[f"{top}{name}/"] for name in names if self.below[f"{top}{name}/"]
        ):
            most = sorted(deeper.items(), key=lambda item: (-item[1], item[0]))
            counts = listed((f"{count:,} in {one_line(name)}/" for name, count in most), MAX_NAMES)
            self.notes.append(
                f"{self.near(top)}: images below the class folders are used: {counts}"
            )

    def refuse_stray(self, top: str) -> None:
        stray = self.direct[top]
        if stray:
            more = f" (and {len(stray) - 1:,} more)" if len(stray) > 1 else ""
            raise UserError(
                f"{one_line(stray[0].path)}{more} is not in a class folder; move it into one, or remove it"
            )

    def empty_folders(self, top: str, warn: bool = False) -> list[str]:
        """List the folders in a folder that could be classes but hold no image; warn: add notes.

        Those that hold runs or only documents are not classes. Raises: UserError if warn, for a folder with
        files of another kind: a class that would be missing.
        """
        found = []
        for folder in self.listing.folders:
            name = folder.removeprefix(top)
            if not folder.startswith(top) or "/" in name or name in self.below[top]:
                continue
            if folder in self.listing.run_parents:
                continue
            kinds = Counter(
                kind_of(f.name) for f in self.listing.others if f.name.startswith(f"{folder}/")
            )
            foreign = (
                sum(n for kind, n in kinds.items() if kind not in DOCUMENTS) > kinds.total() / 2
            )
            if foreign and warn:
                raise UserError(
                    f"folder {self.show(f'{folder}/')} has no image that can be read, only "
                    f"{render_left_out(kinds)}; convert them to JPEG or PNG, or move the folder elsewhere"
                )
            if not kinds or foreign:
                found.append(name)
        if found and warn:
            self.notes.append(
                f"{slashed(found)} in {self.near(top)} {'have' if len(found) > 1 else 'has'} no images: "
                f"left out, not {'classes' if len(found) > 1 else 'a class'}"
            )
        return found

    def leave_out_unlabelled(self, top: str, advice: str = "") -> None:
        """Leave out the images of a folder without class folders."""
        count = len(self.images.pop(top))
        self.left_out[f"unlabelled in {one_line(top)}"] += count
        self.notes.append(
            f"{self.near(top)} has no class folders: its {count:,} images have no labels and are left out"
            + advice
        )

    def warn_of_case(self, names: Iterable[str]) -> None:
        alike = defaultdict(list)
        for name in names:
            alike[one_line(name).casefold()].append(name)
        for same in alike.values():
            if len(same) > 1:
                self.notes.append(
                    f"classes {' and '.join(map(repr, same))} differ only in upper and lower case, or in "
                    "spaces; they are separate classes, so merge the folders if they are one"
                )
        twice = [name for name, count in Counter(self.listing.folders).items() if count > 1]
        if twice:
            self.notes.append(
                f"{slashed(twice)}: two folders of this name in different Unicode forms are read as one"
            )

    def known_classes(
        self, classes: dict[str, list[File]], names: list[str], split: str
    ) -> dict[str, list[File]]:
        """Name the classes of a split as in train. Raises: UserError for a class that train lacks."""
        by_name, by_form = set(names), names_by_form(names)
        result: dict[str, list[File]] = defaultdict(list)
        for name, files in classes.items():
            same = name
            if name not in by_name:
                if form_of(name) not in by_form:
                    raise UserError(
                        f"class {name!r} is only in {split}/ ({len(files):,} images), not in train; add "
                        "training images, or remove the folder"
                    )
                same = by_form[form_of(name)]
                self.notes.append(f"{split}/{name} is read as class {same!r}, which train has")
            result[same] += files
        return result

    def show(self, folder: str) -> str:
        """The path of a folder, for an error."""
        return one_line(os.path.join(self.root, folder).rstrip("/"))

    def near(self, folder: str) -> str:
        """The path of a folder from the root's own name on, for a note."""
        return one_line(f"{os.path.basename(self.root)}/{folder}")


def split_roles(names: Iterable[str]) -> dict[str, str]:
    """Map the names that are split words, in a common form, to the splits: Training_Set to train.

    Words that all names share are ignored, as in seg_train, seg_test.
    """
    words = {name: words_of(name) for name in names}
    shared = set.intersection(*map(set, words.values())) if len(words) > 1 else set()
    ignored = (shared - set(SPLIT_WORDS)) | SPLIT_FILLERS
    roles = {}
    for name, each in words.items():
        left = [word for word in each if word not in ignored]
        if len(left) == 1 and left[0] in SPLIT_WORDS:
            roles[name] = SPLIT_WORDS[left[0]]
    evaluation = [name for name in roles if {"eval", "evaluation"} & set(words[name])]
    taken = [roles[name] for name in roles if name not in evaluation]
    if "validation" in taken and "test" not in taken:
        roles |= dict.fromkeys(evaluation, "test")
    return roles


def words_of(name: str) -> list[str]:
    """Split a folder's name into words in lower case: TestImages, test-images_2 and testimages alike."""
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[^\W\d_]+", name)
    words: list[str] = []
    for word in map(str.lower, found):
        match = re.fullmatch(rf"({'|'.join(SPLIT_WORDS)})({'|'.join(SPLIT_FILLERS)})", word)
        words += match.groups() if match else [word]
    return words


def slashed(names: Iterable[str]) -> str:
    """List folders, each with a trailing slash."""
    return listed((f"{one_line(name)}/" for name in names), MAX_NAMES)
