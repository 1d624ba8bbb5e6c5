"""What an update of a run forgets: two new classes after eight.

EfficientNet-Lite0 is fine-tuned on eight classes of CIFAR-10, and updated with the other two, with different
numbers of stored rows; with --anew, it is also trained anew on all rows. Test is only read for the report.
With --folder, the runs are kept, and the same command continues there. --try measures other updates instead,
which are printed and not recorded.

python -m benchmarks.update --dataset_name DATA [--seeds 3] [--per_class 200] [--anew] [--folder FOLDER]
python -m benchmarks.update --dataset_name DATA --folder FOLDER --try '{"teacher": [500, {"teacher": "RUN"}]}'
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import disable_progress_bars

from benchmarks.studies import arguments, record
from benchmarks.techniques import Options
from hf_cifar import RunConfig, finetune_classifier
from hf_cifar.config.data import DataConfig
from hf_cifar.config.studies import UpdateConfig
from hf_cifar.data.sources import load_source
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.logs import quieten
from hf_cifar.runs.folder import RunFolder
from hf_cifar.studies.update import update_run
from hf_cifar.studies.update_options import config_of_update

NEW = 2  # classes of the update
TEST_PER_CLASS = 100
MODEL: Options = {
    "model_name_or_path": "bundled/efficientnet_lite0", "image_size": 96, "num_train_epochs": 3,
}  # fmt: skip
SHARED: Options = {
    "do_predict": "true", "save_strategy": "no", "load_best_model_at_end": "false",
    "eval_strategy": "no", "calibrate": "false", "disable_tqdm": "true", "precision": "fp32",
}  # fmt: skip
# Stored rows and further options of each update of eight classes.
UPDATES: dict[str, tuple[int, Options]] = {
    "0 stored": (0, {}),
    "200 stored": (200, {}),
    "500 stored": (500, {}),
    "0 stored, plain fine-tuning": (0, {"class_balance": "none", "probe_images": 0}),
}
COMPARED = "500 stored"  # with training anew


def write_part(
    source: Mapping, folder: Path, classes: Sequence[int], per_class: int, seed: int
) -> str:
    """Write some classes of CIFAR-10 as a folder of Parquet files, drawn with a seed; return its name."""
    for split, count in (("train", per_class), ("test", TEST_PER_CLASS)):
        rows = source[split]
        labels = np.array(rows["label"][:])
        order = np.random.default_rng(seed if split == "train" else 0).permutation(len(labels))
        kept = [row for label in classes for row in order[labels[order] == label][:count].tolist()]
        target = folder / "data" / f"{split}-00000-of-00001.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        rows.select(sorted(kept)).to_parquet(str(target))
    return str(folder)


def accuracies(run: Path, known: int, *, adjusted: bool = True) -> dict[str, float]:
    """Return the accuracy on test of the first `known` classes, of the others, and of all.

    adjusted: False to undo --class_balance post_hoc, by the number of training images of each class, unless
    validation had rejected it.
    """
    test, folder = Predictions.load(run, "test"), RunFolder(run)
    logits, is_old = test.logits, test.labels < known
    if not adjusted and folder.facts().get("post_hoc", True):
        counts = np.array(list(folder.facts()["label_counts"]["train"].values())).clip(min=1)
        logits = logits + np.log(counts)
    correct = logits.argmax(axis=1) == test.labels
    found = {"old": float(correct[is_old].mean()), "all": float(correct.mean())}
    return found | ({} if is_old.all() else {"new": float(correct[~is_old].mean())})


def two_after_eight(
    source: Mapping,
    folder: Path,
    seed: int,
    per_class: int,
    chosen: Mapping[str, tuple[int, Options]],
    *,
    anew: bool,
) -> dict[str, dict[str, float]]:
    """Return the accuracies on test before each update and after it, and what is lost, for one seed."""
    order = np.random.default_rng(seed).permutation(10).tolist()
    old = write_part(source, folder / "old", sorted(order[NEW:]), per_class, seed)
    new = write_part(source, folder / "new", sorted(order[:NEW]), per_class, seed)
    run, seeds, known = folder / "run", {"seed": seed}, 10 - NEW
    options = {**MODEL, **seeds, "dataset_name": old, "output_dir": run}
    if not RunFolder(run).facts():
        finetune_classifier(RunConfig.parse(arguments(options, SHARED)))
    before = accuracies(run, known)["old"]
    found: dict[str, dict[str, float]] = {}

    def add(name: str, after: dict[str, float], seconds: float) -> None:
        lost = before - after["old"]
        found[name] = {"before": before, **after, "lost": lost, "seconds": seconds}
        print(f"seed {seed}, {name}: {json.dumps(found[name])}", flush=True)

    for name, (replay, own) in chosen.items():
        output = folder / name.replace(" ", "-")
        given = {**seeds, "dataset_name": new, "output_dir": output, **own}
        config = config_of_update(RunFolder(run), arguments(given, SHARED))
        asked = UpdateConfig(replay=replay, compare_anew=anew and name == COMPARED)
        seconds = update_run(run, config, asked)["seconds"]
        add(name, accuracies(output, known), seconds["update"])
        if config.train.class_balance == "post_hoc":
            plain = accuracies(output, known, adjusted=False)
            add(f"{name}, without post_hoc", plain, seconds["update"])
        if "anew" in seconds:
            add("trained anew", accuracies(output / "anew", known), seconds["anew"])
    return found


def main() -> None:
    """Measure the updates of each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per_class", type=int, default=200)
    parser.add_argument(
        "--folder", type=Path, help="of the runs, which are kept; default: temporary"
    )
    parser.add_argument("--anew", action="store_true", help="also train anew on all rows")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--try", dest="tried", default="{}", help="JSON: name to [replay, options]")
    args = parser.parse_args()
    disable_progress_bars()
    quieten(True)
    source = load_source(DataConfig(dataset_name=args.dataset_name))
    chosen = json.loads(args.tried) or UPDATES
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(args.seeds):
            folder = (args.folder or Path(temporary)) / f"seed-{seed}"
            found.append(
                two_after_eight(source, folder, seed, args.per_class, chosen, anew=args.anew)
            )
    if args.tried == "{}":
        record(
            "update, two classes after eight",
            {name: [each[name]["lost"] for each in found] for name in found[0]},
            args.output, unit="accuracy lost on the old classes", runs=found,
            per_class=args.per_class, test_per_class=TEST_PER_CLASS,
        )  # fmt: skip


if __name__ == "__main__":
    main()
