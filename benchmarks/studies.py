"""The effect of combining many runs into one result: ensembles, soups, views, folds and a student.

combine: three runs of each model with different seeds, and their combinations. kfold: five folds, their
ensemble, and a student of it. distillation: a student with and without a teacher, which is a finished run on
the same split, seed by seed. All are evaluated on test.

python -m benchmarks.studies --dataset_name DATA [--only combine] [--models article_cnn] [--teacher NAME=RUN]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import disable_progress_bars

from benchmarks.measure import conditions, summary, write
from benchmarks.techniques import ALL, CNN, MODELS, SMALL, Options, paired_differences
from hf_cifar import RunConfig, finetune_classifier
from hf_cifar.config.studies import CombineConfig
from hf_cifar.hub.origin import public_name
from hf_cifar.logs import quieten
from hf_cifar.runs.folder import RunFolder
from hf_cifar.studies.combine import combine_runs
from hf_cifar.studies.kfold import cross_validate
from hf_cifar.studies.student import student_of

RUNS, FOLDS = 3, 5
PATIENCE = 3  # times the epochs of the folds
SHARED: Options = {
    "do_predict": "true", "disable_tqdm": "true", "precision": "bf16", "memory_format": "channels_last",
    "save_total_limit": 1,
}  # fmt: skip
Values = dict[str, list[float]]


def arguments(options: Mapping[str, object], shared: Options = SHARED) -> list[str]:
    """Return options as a command line."""
    return [f"--{name}={value}" for name, value in {**shared, **options}.items()]


def accuracy(run: str | Path) -> float:
    """Return a run's accuracy on test."""
    return float(RunFolder(run).metrics()["test"]["accuracy"])


def combine(options: Options, seed: int, folder: Path) -> dict[str, float]:
    """Return the accuracies of three runs, and of their combinations."""
    runs = [folder / f"run-{number}" for number in range(RUNS)]
    for number, run in enumerate(runs):
        own = {**options, "seed": RUNS * seed + number, "output_dir": run}
        finetune_classifier(RunConfig.parse(arguments(own)))
    # The single run to compare with is the best one on validation.
    best = max(runs, key=lambda run: RunFolder(run).metrics()["validation"]["accuracy"])
    found = {
        "best run on validation": accuracy(best),
        "mean of 3 runs": float(np.mean([accuracy(run) for run in runs])),
    }
    for name, members, method, views in (
        ("ensemble", runs, "ensemble", "image"),
        ("uniform soup", runs, "uniform_soup", "image"),
        ("greedy soup", runs, "greedy_soup", "image"),
        ("best run, with mirror images", [best], "ensemble", "flip"),
        ("best run, with crops", [best], "ensemble", "crops"),
        ("ensemble, with mirror images", runs, "ensemble", "flip"),
    ):
        output = folder / name.replace(",", "").replace(" ", "-")
        combine_runs(
            members,
            CombineConfig(output_dir=str(output), method=method, views=views, do_predict=True),
        )
        found[name] = accuracy(output)
    return found


def kfold(options: Options, seed: int, folder: Path) -> dict[str, float]:
    """Return the accuracies of five folds, their ensemble, and a student of it."""
    own = arguments({**options, "seed": seed, "output_dir": folder})
    model = str(options["model_name_or_path"])
    student = student_of(model, own, "benchmarks.studies")
    folds = cross_validate(RunConfig.parse(own), FOLDS, student=student)
    patient = student.with_training(
        output_dir=str(folder / "patient"),
        num_train_epochs=PATIENCE * float(str(options["num_train_epochs"])),
        resume_from_checkpoint=None,
    )
    finetune_classifier(patient)
    return {
        "mean of 5 folds": folds["metrics"]["test"]["accuracy"]["mean"],
        "ensemble of the folds": accuracy(folder / "ensemble"),
        "student of the ensemble": accuracy(folder / "student"),
        "student, three times the epochs": accuracy(folder / "patient"),
        "all out-of-fold predictions": float(
            RunFolder(folder).metrics()["out_of_fold"]["accuracy"]
        ),
    }


def distil(options: Options, seed: int, folder: Path, teacher: str) -> dict[str, float]:
    """Return the accuracies of a model trained alone and with a teacher, with the same steps and views."""
    found = {}
    for name, own in {
        "alone": {},
        "teacher": {"teacher": teacher},
        "teacher, temperature 4": {"teacher": teacher, "distillation_temperature": 4},
        "teacher, feature hint": {"teacher": teacher, "feature_hint": 1},
    }.items():
        output = folder / name.replace(",", "").replace(" ", "-")
        chosen = {**options, **own, "seed": seed, "output_dir": output}
        finetune_classifier(RunConfig.parse(arguments(chosen)))
        found[name] = accuracy(output)
    return found


def record(name: str, values: Values, output: Path | None, **facts: object) -> None:
    """Write the accuracies of all seeds, and the differences from the first variant. facts: what else to
    write; they may replace the unit."""
    first = next(iter(values))
    # One seed has no interval.
    differences = paired_differences(values, first) if len(values[first]) > 1 else {}
    write(
        {
            "benchmark": name, "unit": "accuracy", "n": len(values[first]),
            "figures": {variant: summary(each) for variant, each in values.items()},
            "ratios": {}, "values": values, "differences": differences, **facts, **conditions(),
        },
        output,
    )  # fmt: skip
    for variant, each in values.items():
        gain = differences.get(variant, "")
        print(f"{name}: {variant} {np.mean(each):.4f} {gain}", flush=True)


def repeated(measure, options: Options, seeds: Sequence[int], **own: object) -> Values:
    """Measure with each seed, in a temporary folder."""
    values: Values = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name, value in measure(options, seed, Path(folder), **own).items():
                values.setdefault(name, []).append(value)
                print(f"seed {seed}: {name} {value:.4f}", flush=True)
    return values


def main() -> None:
    """Measure the chosen studies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--only", nargs="+", choices=("combine", "kfold", "distillation"))
    parser.add_argument("--models", nargs="+", choices=(CNN, ALL), default=[CNN, ALL])
    parser.add_argument("--teacher", help="NAME=RUN, for distillation")
    parser.add_argument("--recipe", default="article_cnn", help="of the student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder for the JSON lines")
    options = parser.parse_args()
    disable_progress_bars()
    quieten(True)
    seeds, data = range(options.seeds), {"dataset_name": options.dataset_name}
    only = options.only or ["combine", "kfold"]
    for name, measure in (("combine", combine), ("kfold", kfold)):
        for model in options.models if name in only else ():
            chosen = {**data, **(SMALL if model == CNN else {}), **MODELS[model]}
            record(
                f"{name}, {model}",
                repeated(measure, chosen, seeds),
                options.output,
                options=chosen | {"dataset_name": public_name(options.dataset_name)},
            )
    if "distillation" in only:
        teacher, _, run = options.teacher.rpartition("=")
        split = RunFolder(run).data()
        chosen = {"recipe": options.recipe, **data}
        chosen |= {name: getattr(split, name) for name in ("train_val_split", "split_seed")}
        found = repeated(distil, chosen, seeds, teacher=run)
        record(
            f"distillation, {options.recipe} from {teacher}", found, options.output,
            teacher_accuracy=accuracy(run), recipe=options.recipe,
        )  # fmt: skip


if __name__ == "__main__":
    main()
