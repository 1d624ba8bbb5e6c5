"""How often `hf-cifar drift` finds drift: in test images of a run, unchanged and corrupted.

Each draw compares random test images with random validation images of the run, by the tests of the command.

python -m benchmarks.drift --run RUN [--draws 100] [--num_images 500] [--pool 1000]
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from benchmarks.measure import conditions, summary, write
from hf_cifar.data.split import Split, prepare_split
from hf_cifar.data.unlabelled import UnlabelledImages
from hf_cifar.evaluation.corruptions import CORRUPTIONS, corrupt
from hf_cifar.evaluation.intervals import wilson
from hf_cifar.evaluation.label_free import estimated_accuracy
from hf_cifar.evaluation.predictions import outcome_of
from hf_cifar.logs import quieten
from hf_cifar.models.build import load_classifier
from hf_cifar.report.drift import Outputs, run_tests
from hf_cifar.run_data import open_data, used_splits
from hf_cifar.runs.folder import RunFolder
from hf_cifar.studies.drift import compute_outputs, unlabelled_split
from hf_cifar.transforms.preprocessing import Preprocessing

SEVERITIES, DECISIVE = (1, 3, 5), 3  # the target is for the second one
REFERENCE = 2000  # validation images, as in the command
ALPHA = 0.05


def chosen(outputs: Outputs, rows: np.ndarray) -> Outputs:
    """Return the outputs of some of the images."""
    outcome = outputs.outcome
    return Outputs(
        outputs.features[rows],
        outcome_of(outcome.logits[rows], outcome.labels[rows], thresholds=outcome.thresholds),
    )


class Laboratory:
    """A run with its data, and the share of draws in which the tests find drift."""

    def __init__(self, run: Path) -> None:
        self.files = RunFolder(run)
        source = open_data(self.files)
        validation, self.test = used_splits(self.files, source).validation, source.test_split
        self.model, image_processor = load_classifier(str(run))
        self.model = self.model.to(memory_format=torch.channels_last).eval()
        self.preprocessing = Preprocessing.from_image_processor(image_processor)
        self.names = list(validation.id2label.values())
        self.reference = self.outputs(validation)

    def outputs(self, split: Split) -> Outputs:
        """Return the outputs of all images of a split."""
        return compute_outputs(
            self.model, prepare_split(split, self.preprocessing), self.preprocessing
        )

    def corrupted(self, rows: np.ndarray, name: str, severity: int) -> Outputs:
        """Return the outputs of corrupted test images, which the command would read from PNG files."""
        cells = []
        for row in rows.tolist():
            pixels = torch.from_numpy(self.test.decode(row).copy()).permute(2, 0, 1)[None]
            file = io.BytesIO()
            Image.fromarray(_array(corrupt(pixels, name, severity, [row]))).save(file, "PNG")
            cells.append({"bytes": file.getvalue(), "path": None})
        data = Dataset.from_dict(
            {"image": cells}, features=Features({"image": ImageFeature(decode=False)})
        )
        images = UnlabelledImages(data, {})
        return self.outputs(
            unlabelled_split(images, np.arange(len(rows)), self.model, self.files.data())
        )

    def found(self, new: Outputs, num_images: int, draws: int) -> Iterator[dict]:
        """Yield the results of the tests for each draw of both samples."""
        for seed in range(draws):
            generator = np.random.default_rng(seed)
            parts = [
                chosen(each, generator.permutation(len(each.features))[:count])
                for each, count in ((self.reference, REFERENCE), (new, num_images))
            ]
            yield run_tests(*parts, self.names, ALPHA, seed)


def _array(images: Tensor) -> np.ndarray:
    return images[0].permute(1, 2, 0).numpy()


def rate(hits: int, count: int) -> dict[str, float]:
    """Return a share with its 95% interval, in the form of the figures of a record."""
    low, high = wilson(hits, count).tolist()
    return {"median": round(hits / count, 4), "low": round(low, 4), "high": round(high, 4)}


def by_test(results: Sequence[dict]) -> dict[str, int]:
    """Count the draws in which each test, or either of them, finds drift."""
    counts = {name: sum(each[name]["drift"] for each in results) for name in ("ks", "mmd")}
    return {
        **counts,
        "either": sum(each["ks"]["drift"] or each["mmd"]["drift"] for each in results),
    }


def main() -> None:
    """Measure false alarms, power, and the error of the estimated accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=100, help="of clean images")
    parser.add_argument("--corrupted_draws", type=int, default=10, help="of each corruption")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument(
        "--fewer_images", type=int, default=100, help="for a second measure of power"
    )
    parser.add_argument("--pool", type=int, default=1000, help="test images that are corrupted")
    parser.add_argument("--output", type=Path, help="folder for the JSON lines")
    options = parser.parse_args()
    quieten(True)
    lab = Laboratory(options.run)
    clean = lab.outputs(lab.test)
    rows = np.sort(np.random.default_rng(0).permutation(len(lab.test))[: options.pool])
    labels = lab.test.labels[rows]
    counts: dict[str, dict[str, int]] = {}
    figures: dict[str, dict[str, float]] = {}
    accuracy: dict[str, dict[str, float]] = {}

    def measure(name: str, new: Outputs, num_images: int, draws: int) -> None:
        counts[name] = by_test(list(lab.found(new, num_images, draws)))
        figures[name] = rate(counts[name]["either"], draws)
        print(f"{name}: {counts[name]} of {draws}", flush=True)

    def estimate(name: str, new: Outputs) -> None:
        known, hits = lab.reference.outcome, new.outcome.predicted == labels
        found, _ = estimated_accuracy(
            known.probabilities, known.correct, new.outcome.probabilities, draws=2
        )
        accuracy[name] = {"true": float(hits.mean()), "estimate": found}
        print(f"{name}: {accuracy[name]}", flush=True)

    measure("clean", clean, options.num_images, options.draws)
    estimate("clean", chosen(clean, rows))
    for name in CORRUPTIONS:
        for severity in SEVERITIES:
            new, what = lab.corrupted(rows, name, severity), f"{name}, severity {severity}"
            estimate(what, new)
            measure(what, new, options.num_images, options.corrupted_draws)
            if severity == DECISIVE:
                fewer = f"{what}, {options.fewer_images} images"
                measure(fewer, new, options.fewer_images, options.corrupted_draws)
    shared = {"ratios": {}, "num_reference": REFERENCE, **conditions()}
    for kind, draws in (("clean", options.draws), ("corrupted", options.corrupted_draws)):
        names = [name for name in figures if (name == "clean") == (kind == "clean")]
        record = {
            "benchmark": f"drift, {options.num_images} {kind} images against {REFERENCE}",
            "unit": "of draws with drift", "n": draws, "pool": options.pool, "alpha": ALPHA,
            "figures": {name: figures[name] for name in names},
            "counts": {name: counts[name] for name in names}, **shared,
        }  # fmt: skip
        write(record, options.output)
    errors = [abs(each["estimate"] - each["true"]) for each in accuracy.values()]
    record = {
        "benchmark": "accuracy without labels, clean and corrupted images", "unit": "error", "n": len(errors),
        "figures": {"average thresholded confidence": summary(errors)},
        "mean": float(np.mean(errors)), "accuracy": accuracy, **shared,
    }  # fmt: skip
    write(record, options.output)


if __name__ == "__main__":
    main()
