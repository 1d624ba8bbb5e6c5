"""The effect of each technique: paired runs on one split, with the difference from a run without it.

python -m benchmarks.techniques --dataset_name DATA [--only imbalance] [--models article_cnn]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import disable_progress_bars
from scipy.stats import t

from benchmarks.measure import conditions, summary, write
from hf_cifar import RunConfig, finetune_classifier
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.logs import quieten

Options = Mapping[str, object]
# Options of each model: one trained from random weights, a head on features that are computed once, and a
# pretrained network whose layers all train.
CNN, HEAD, ALL = "article_cnn", "efficientnet_lite0, head", "efficientnet_lite0, all layers"
MODELS: dict[str, Options] = {
    CNN: {
        "model_name_or_path": "scratch/article_cnn", "num_train_epochs": 10,
        "per_device_train_batch_size": 64, "learning_rate": 1e-3,
    },
    HEAD: {
        "model_name_or_path": "bundled/efficientnet_lite0", "freeze": "backbone", "image_size": 96,
        "num_train_epochs": 10, "max_eval_samples": 2500, "learning_rate": 1.41e-3,
    },
    ALL: {
        "model_name_or_path": "bundled/efficientnet_lite0", "image_size": 64, "num_train_epochs": 3,
        "max_train_samples": 2000, "max_eval_samples": 2500,
    },
}  # fmt: skip
SHARED = {
    "do_predict": "true", "save_strategy": "no", "load_best_model_at_end": "false",
    "eval_strategy": "no", "calibrate": "false", "disable_tqdm": "true", "precision": "fp32",
}  # fmt: skip
Metric = Callable[[Predictions], float]


def accuracy(predictions: Predictions) -> float:
    return float(predictions.correct.mean())


def balanced_accuracy(predictions: Predictions) -> float:
    return float(predictions.metrics["balanced_accuracy"])


@dataclass(frozen=True)
class Technique:
    """The options of each variant, the first of which is the run without the technique."""

    variants: Mapping[str, Options]
    models: tuple[str, ...] = (CNN, HEAD)
    options: Options = field(default_factory=dict)  # of all variants
    metric: Metric = accuracy


class Laboratory:
    """Trains on one data set, in a temporary folder; the split is the same in every run."""

    def __init__(self, dataset_name: str, folder: Path, output: Path | None = None) -> None:
        self.dataset_name, self.folder, self.count = dataset_name, folder, 0
        self.output = output  # of the records

    def test(self, options: Options, seed: int) -> Predictions:
        """Return the predictions on test of a run with these options."""
        self.count += 1
        run = self.folder / f"run-{self.count}"
        chosen = {
            "dataset_name": self.dataset_name, "output_dir": run, "seed": seed, **SHARED, **options,
        }  # fmt: skip
        finetune_classifier(
            RunConfig.parse([f"--{name}={value}" for name, value in chosen.items()])
        )
        return Predictions.load(run, "test")


def paired_interval(differences: list[float]) -> list[float]:
    """Return the 95% interval of the mean of paired differences, by Student's t."""
    mean, error = np.mean(differences), np.std(differences, ddof=1) / len(differences) ** 0.5
    reach = t.ppf(0.975, len(differences) - 1) * error
    return [round(float(mean - reach), 4), round(float(mean + reach), 4)]


def paired_differences(
    values: Mapping[str, list[float]], first: str
) -> dict[str, dict[str, object]]:
    """Return the mean difference of each variant from the `first`, seed by seed, and its 95% interval."""
    found: dict[str, dict[str, object]] = {}
    for variant, each in values.items():
        if variant != first:
            gains = [b - a for a, b in zip(values[first], each, strict=True)]
            mean = round(float(np.mean(gains)), 4)
            found[variant] = {"mean": mean, "interval": paired_interval(gains)}
    return found


def compare(lab: Laboratory, name: str, model: str, seeds: int, wanted: list[str]) -> None:
    """Run every variant with every seed, and record the metric and its difference from the first variant."""
    technique = TECHNIQUES[name]
    options = {
        variant: {**technique.options, **MODELS[model], **each}
        for number, (variant, each) in enumerate(technique.variants.items())
        if not wanted or variant in wanted or number == 0
    }
    values = {
        variant: [technique.metric(lab.test(each, seed)) for seed in range(seeds)]
        for variant, each in options.items()
    }
    differences = paired_differences(values, next(iter(values)))
    record = {
        "benchmark": f"{name}, {model}", "unit": technique.metric.__name__.replace("_", " "),
        "n": seeds, "figures": {variant: summary(each) for variant, each in values.items()},
        "ratios": {}, "values": values,
        "differences": differences,
        "options": options,
        **conditions(),
    }  # fmt: skip
    write(record, lab.output)
    for variant, each in values.items():
        gain = differences.get(variant, "")
        print(f"{name}, {model}: {variant} {np.mean(each):.4f} {gain}", flush=True)


def named(option: str, *values: object) -> dict[str, Options]:
    """Return a variant for each value of an option, named after it."""
    return {str(value): {option: value} for value in values}


# Learning rates of the comparison of optimisers.
RATES = {
    "adamw_torch": 1e-3, "adam": 2e-3, "rmsprop": 1e-3, "adagrad": 0.01, "lion": 1e-3, "muon": 5e-3,
    "sgd": 0.2,
}  # fmt: skip
SMALL = {"max_train_samples": 5000}
TECHNIQUES: dict[str, Technique] = {
    "imbalance": Technique(
        {
            "cross-entropy": {},
            **named(
                "class_balance",
                "oversample", "undersample", "weights", "effective", "logit_adjustment",
            ),
            "focal": {"loss": "focal"},
        },
        options={"imbalance_factor": 100},
        metric=balanced_accuracy,
    ),
    "optimiser": Technique(
        {
            **{name: {"optim": name, "learning_rate": rate} for name, rate in RATES.items()},
            "sgd, Nesterov momentum": {
                "optim": "sgd", "optim_args": "momentum=0.9,nesterov=true", "learning_rate": 0.02,
            },
        },
        models=(CNN,),
        options=SMALL,
    ),
    "schedule": Technique(
        {
            **named(
                "lr_scheduler_type",
                "linear", "constant", "cosine", "exponential", "step", "multistep", "inverse_time",
                "one_cycle",
            ),
            "reduce_lr_on_plateau": {
                "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch",
                "lr_scheduler_kwargs": '{"patience": 1}',
            },
        },
        models=(CNN,),
        options=SMALL,
    ),
    "weight penalty": Technique(
        {
            "none": {"weight_decay": 0},
            "L2 0.05": {"weight_decay": 0.05},
            "L2 0.5": {"weight_decay": 0.5},
            "L1 0.001": {"weight_decay": 0, "l1_decay": 0.001},
            "L1 0.01": {"weight_decay": 0, "l1_decay": 0.01},
        },
        models=(CNN,),
        options=SMALL,
    ),
    "regularisation": Technique(
        {
            "none": {},
            "label smoothing": {"label_smoothing_factor": 0.1},
            "EMA": {"ema_decay": 0.999},
            "mixup": {"mixup_alpha": 0.2},
            "cutmix": {"cutmix_alpha": 1},
            "trivial_augment": {"auto_augment": "trivial_augment"},
            "random erasing": {"random_erasing": 0.25},
            "SAM": {"sam_rho": 0.05},
        },
        models=(CNN, ALL),
        options={"label_smoothing_factor": 0, **SMALL},
    ),
    "start of fine-tuning": Technique(
        {
            "fitted head, statistics of the checkpoint": {},
            "random head": {"probe_images": 0},
            "statistics of the batch": {"freeze_batch_norm": "false"},
            "random head, statistics of the batch": {"probe_images": 0, "freeze_batch_norm": "false"},
            "the same, learning rate 2e-3, no clipping": {
                "probe_images": 0, "freeze_batch_norm": "false", "learning_rate": 2e-3, "max_grad_norm": 0,
            },
        },
        models=(ALL,),
    ),
    "dropout": Technique(
        {"none": {}, "dropout 0.2": {"dropout": 0.2}, "stochastic depth 0.1": {"drop_path": 0.1}},
        models=(ALL,),
    ),
    "parts of the network": Technique(
        {
            "all layers": {},
            "head only": {"freeze": "backbone"},
            "last 3 blocks": {"freeze": 3},
            "layer decay 0.8": {"layer_decay": 0.8},
            "backbone at a tenth of the rate": {"backbone_learning_rate": 3.5e-5},
            "gradual unfreezing": {"unfreeze_epochs": 0.25},
            "LoRA, rank 8": {"lora_rank": 8},
        },
        models=(ALL,),
    ),
    **{
        f"epochs, {images} images": Technique(
            {
                f"{epochs} epochs": {"num_train_epochs": epochs, "max_train_samples": images}
                for epochs in (3, 10, 30)
            },
            models=(HEAD, ALL),
        )
        for images in (300, 1200)
    },
}  # fmt: skip


def few_shot(lab: Laboratory, draws: int) -> None:
    """Record the accuracy of the exact head by the number of images per class, over draws of the images."""
    exact = {**MODELS[HEAD], "head_solver": "lbfgs"}
    values = {
        f"{shots} per class": [
            accuracy(lab.test({**exact, "shots": shots, "split_seed": draw}, 0))
            for draw in range(draws)
        ]
        for shots in (1, 5, 10, 25, 100)
    }
    record = {
        "benchmark": f"few shots, {HEAD}", "unit": "accuracy", "n": draws,
        "figures": {variant: summary(each) for variant, each in values.items()},
        "intervals": {variant: paired_interval(each) for variant, each in values.items()},
        "ratios": {}, "values": values, **conditions(),
    }  # fmt: skip
    write(record, lab.output)
    for variant, each in values.items():
        print(f"{variant}: {np.mean(each):.4f} {paired_interval(each)}", flush=True)


def main() -> None:
    """Measure the chosen techniques."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--only", nargs="+", choices=(*TECHNIQUES, "few shots"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=[], help="besides the first")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=5, help="of few shots")
    parser.add_argument("--output", type=Path, help="folder for the JSON lines")
    options = parser.parse_args()
    disable_progress_bars()
    quieten(True)
    only = options.only or [*TECHNIQUES, "few shots"]
    with tempfile.TemporaryDirectory() as folder:
        lab = Laboratory(options.dataset_name, Path(folder), options.output)
        for name, technique in TECHNIQUES.items():
            for model in technique.models:
                if name in only and model in options.models:
                    compare(lab, name, model, options.seeds, options.variants)
        if "few shots" in only:
            few_shot(lab, options.draws)


if __name__ == "__main__":
    main()
