"""Faults planted into images of CIFAR-10: which of them hf-cifar doctor finds, and how long it takes.

python -m benchmarks.doctor --dataset_name DATA [--train 9000] [--test 1000]
python -m benchmarks.doctor --dataset_name DATA --labels [--train 9000]

The same images without faults must give no warning. With --labels: the scores of pairs of classes, without
and with a tenth of one class labelled as another. If the machine is busy, the times are upper bounds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import conditions, summary, write
from hf_cifar.audit.discriminants import out_of_fold_probabilities
from hf_cifar.audit.labels import unlikely_pairs
from hf_cifar.audit.survey import survey_split
from hf_cifar.cli import main as hf_cifar
from hf_cifar.config.data import DataConfig
from hf_cifar.config.model import ModelConfig
from hf_cifar.data.split import Split
from hf_cifar.data.splits import DataSource
from hf_cifar.doctor.suspects import (
    BATCH,
    BUNDLED_MODEL,
    Candidate,
    features_of_batches,
    headless,
)
from hf_cifar.models.build import build_model
from hf_cifar.training.cleaning import assign_folds
from hf_cifar.transforms.preprocessing import Preprocessing

SEED = 0
FLAGS = (
    "--model_name_or_path", "bundled/efficientnet_lite0", "--image_size", "64", "--on_bad_image", "skip",
)  # fmt: skip


def write_images(root: Path, dataset_name: str, train: int, test: int) -> None:
    """Write images as files, JPEG or PNG as they are, in class folders: train, validation and test."""
    held_out = max(1, train // 10)
    data = DataConfig(dataset_name, max_train_samples=train - held_out, max_eval_samples=held_out)
    source = DataSource(data)
    tested = DataSource(DataConfig(dataset_name, max_eval_samples=test)).test_split
    for name, split in (
        ("train", source.splits.train), ("validation", source.splits.validation), ("test", tested),
    ):  # fmt: skip
        for row, (cell, label) in enumerate(
            zip(split.rows["image"], split.labels.tolist(), strict=True)  # type: ignore[union-attr]
        ):
            folder = root / name / split.id2label[label]
            folder.mkdir(parents=True, exist_ok=True)
            kind = "jpg" if cell["bytes"][:2] == b"\xff\xd8" else "png"
            (folder / f"{row:05}.{kind}").write_bytes(cell["bytes"])


class Planter:
    """Plants faults into a folder written by `write_images`, each into different images."""

    def __init__(self, root: Path) -> None:
        self.root, self.generator = root, np.random.default_rng(SEED)
        self.used: set[Path] = set()

    def take(self, where: str, count: int) -> list[Path]:
        """Return unused files of a folder, at random."""
        free = sorted(set(Path(self.root, where).rglob("*.*")) - self.used)
        chosen = [free[k] for k in self.generator.permutation(len(free))[:count]]
        self.used |= set(chosen)
        return chosen

    def truncated(self) -> None:
        """Cut a file in half."""
        (path,) = self.take("train/airplane", 1)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def empty(self) -> None:
        """Empty a file."""
        self.take("train/ship", 1)[0].write_bytes(b"")

    def not_an_image(self) -> None:
        """Replace a file by a text of the same name."""
        self.take("train/deer", 1)[0].write_text("<html>404 not found</html>\n")

    def exact_across(self) -> None:
        """Copy images of train into validation and test."""
        for split in ("validation", "test"):
            for path in self.take("train/bird", 3):
                shutil.copyfile(path, self.root / split / "bird" / f"copied-{path.name}")

    def near(self) -> None:
        """Brighten and re-encode images of train, a fiftieth of all."""
        count = max(3, len(list((self.root / "train").rglob("*.*"))) // 50)
        for path in self.take("train", count):
            brighter = Image.open(path).convert("RGB").point(lambda value: min(255, value + 6))
            copy = path.with_name(f"near-{path.stem}.jpg")
            brighter.save(copy, quality=85)
            self.used.add(copy)

    def contradicting(self) -> None:
        """Copy images of one class into another."""
        for path in self.take("train/dog", 3):
            copy = self.root / "train" / "deer" / f"copied-{path.name}"
            shutil.copyfile(path, copy)
            self.used.add(copy)

    def rare(self) -> None:
        """Keep a tenth of the training images of a class."""
        files = sorted((self.root / "train" / "horse").iterdir())
        for path in files[len(files) // 10 :]:
            path.unlink()

    def blank(self) -> None:
        """Make a class of images of one colour."""
        for split, count in (("train", 60), ("validation", 6)):
            (self.root / split / "void").mkdir()
            for number in range(count):
                colour = tuple(self.generator.integers(0, 256, 3).tolist())
                Image.new("RGB", (32, 32), colour).save(
                    self.root / split / "void" / f"{number:03}.png"
                )

    def swapped(self) -> None:
        """Give a tenth of the trucks the label frog."""
        number = len(list((self.root / "train" / "truck").iterdir())) // 10
        for path in self.take("train/truck", number):
            path.rename(self.root / "train" / "frog" / f"moved-{path.name}")

    def deep(self) -> None:
        """Replace images by grey ones of 16 bits."""
        for path in self.take("train/automobile", 20):
            grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16
            path.unlink()
            Image.fromarray(grey).save(path.with_suffix(".png"))

    def spelling(self) -> None:
        """Move some cats into a folder Cats."""
        for split, count in (("train", 40), ("validation", 5)):
            (self.root / split / "Cats").mkdir()
            for path in self.take(f"{split}/cat", count):
                path.rename(self.root / split / "Cats" / path.name)

    def huge(self) -> None:
        """Enlarge an image to 6,000 x 4,000 pixels."""
        (path,) = self.take("train/ship", 1)
        Image.open(path).convert("RGB").resize((6000, 4000)).save(path, quality=80)


def named(facts: dict[str, Any], name: str, *words: str) -> bool:
    """Return True if an error or warning of this name has these words in its text, or an image's note."""
    for finding in facts["findings"]:
        if finding["level"] == "note" or finding["name"] != name:
            continue
        text = finding["text"] + "".join(str(image) for image in finding["images"])
        if all(word in text for word in words):
            return True
    return False


# What each fault is, and how it counts as named.
FAULTS: dict[str, tuple[Callable[[Planter], None], Callable[[dict[str, Any]], bool]]] = {
    "huge image": (Planter.huge, lambda f: named(f, "huge images", "6000 x 4000")),
    "truncated file": (Planter.truncated, lambda f: named(f, "unreadable images", "airplane")),
    "empty file": (Planter.empty, lambda f: named(f, "unreadable images", "empty")),
    "text named .jpg": (Planter.not_an_image, lambda f: named(f, "unreadable images", "deer")),
    "exact duplicates in validation and test": (
        Planter.exact_across,
        lambda f: named(f, "exact duplicates, validation and train")
        and named(f, "exact duplicates, test and train"),
    ),
    "duplicates with different labels": (
        Planter.contradicting, lambda f: named(f, "duplicates with different labels", "deer", "dog"),
    ),
    "near duplicates": (Planter.near, lambda f: named(f, "near duplicates, train")),
    "16-bit grey among colour": (Planter.deep, lambda f: named(f, "more than 8 bits")),
    "swapped labels": (Planter.swapped, lambda f: named(f, "suspicious labels", "'frog'", "'truck'")),
    "two spellings of a class": (
        Planter.spelling, lambda f: named(f, "similar class names", "'Cats'", "'cat'"),
    ),
    "blank class": (Planter.blank, lambda f: named(f, "blank images", "void")),
    "rare class": (Planter.rare, lambda f: named(f, "imbalance")),
}  # fmt: skip


def examine(root: Path, flags: list[str]) -> tuple[dict[str, Any], float]:
    """Run hf-cifar doctor; return its facts, and its seconds."""
    file = root.parent / "found.json"
    start = time.perf_counter()
    output = ["--output_dir", str(root.parent / "run"), "--json", str(file)]
    hf_cifar(["doctor", str(root), *output, *flags])
    return json.loads(file.read_text()), time.perf_counter() - start


def measure(
    dataset_name: str, train: int, test: int, flags: list[str], output: Path | None
) -> None:
    """Examine clean and faulty images, and record what was named."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "images")
        write_images(root, dataset_name, train, test)
        count = len(list(root.rglob("*.*")))
        clean, clean_seconds = examine(root, flags)
        planter = Planter(root)
        for plant, _ in FAULTS.values():
            plant(planter)
        faulty, faulty_seconds = examine(root, flags)
    found = {name: check(faulty) for name, (_, check) in FAULTS.items()}
    alarms = [each["text"] for each in clean["findings"] if each["level"] != "note"]
    for name, is_named in found.items():
        print(f"{name}: {'named' if is_named else 'MISSED'}")
    print(
        f"{sum(found.values())} of {len(found)} named; on clean images {len(alarms)} warnings {alarms}"
    )
    seconds = {"clean": clean_seconds, "with faults": faulty_seconds}
    write(
        {
            "benchmark": f"doctor, {count:,} images of CIFAR-10", "unit": "s", "n": 1,
            "figures": {name: summary([value]) for name, value in seconds.items()}, "ratios": {},
            "command": f"python -m benchmarks.doctor --train {train} --test {test}",
            "flags": flags, "named": found, "warnings_on_clean_images": alarms,
            "labels": {"clean": clean["labels"], "with faults": faulty["labels"]},
            "time_is": "an upper bound: other work shared the cores",
            **conditions(),
        },
        output,
    )  # fmt: skip


SWAPS = (("truck", "frog"), ("airplane", "ship"), ("cat", "dog"))


def measure_labels(dataset_name: str, train: int, size: int, output: Path | None) -> None:
    """Record the highest score of a pair of classes, and that of the changed pair, at an image size."""
    config = ModelConfig(model_name_or_path=BUNDLED_MODEL, image_size=size)
    split = DataSource(DataConfig(dataset_name, max_train_samples=train)).splits.train
    assert isinstance(split, Split)
    model, image_processor = build_model(config, split.id2label)
    preprocessing = Preprocessing.from_image_processor(image_processor)
    images = np.stack([split.decode(row) for row in range(len(split))]).transpose(0, 3, 1, 2)
    batches = torch.from_numpy(images).split(BATCH)
    small = headless(model, preprocessing(batches[0][:2]))
    candidate = Candidate(BUNDLED_MODEL, small, preprocessing, 0.0)
    features = {"8 x 8 pixels": survey_split(split).colours.reshape(len(split), -1) / 255}
    features |= {f"{size} px": np.concatenate([*features_of_batches(candidate, batches)])}
    ids = {name: label for label, name in split.id2label.items()}
    folds = assign_folds(split, SEED)
    scores: dict[str, float] = {}
    for words, values in features.items():
        for count in (len(split), 2000):
            chosen = np.random.default_rng(SEED).permutation(len(split))[:count]
            for given, other in (("", ""), *SWAPS):
                labels = split.labels[chosen].copy()
                moved = np.flatnonzero(labels == ids.get(given, -1))
                labels[moved[: len(moved) // 10]] = ids.get(other, -1)
                found = out_of_fold_probabilities(values[chosen], labels, folds[chosen], len(ids))
                pairs = unlikely_pairs(found, labels)
                if given:
                    pairs = [p for p in pairs if (p.given, p.suggested) == (ids[other], ids[given])]
                what = f"{given} -> {other}" if given else "clean, highest"
                scores[f"{words}, {count:,} images, {what}"] = pairs[0].score if pairs else 0.0
                if not given:
                    right = float((found.argmax(axis=1) == labels).mean())
                    scores[f"{words}, {count:,} images, share right"] = right
    for name, score in scores.items():
        print(f"{name}: {score:.3g}")
    write(
        {
            "benchmark": f"doctor, labels, {size} px", "unit": "score", "n": 1,
            "figures": {name: summary([score]) for name, score in scores.items()}, "ratios": {},
            "command": f"python -m benchmarks.doctor --labels --train {train}", **conditions(),
        },
        output,
    )  # fmt: skip


def main() -> None:
    """Plant, examine and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--train", type=int, default=9000, help="images of train and validation")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="folder for the JSON lines")
    parser.add_argument("--labels", action="store_true", help="scores of labels, instead of faults")
    options, flags = parser.parse_known_args()
    if options.labels:
        for size in (64, 96):
            measure_labels(options.dataset_name, options.train, size, options.output)
        return
    measure(options.dataset_name, options.train, options.test, [*FLAGS, *flags], options.output)


if __name__ == "__main__":
    main()
