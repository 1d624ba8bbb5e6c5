"""Combine finished runs into one: an ensemble, or a soup (one network with the mean of their weights).

Sources: Wortsman et al., Model Soups, 2022; Szegedy et al., Going Deeper with Convolutions, 2014, for crops.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.config.studies import CombineConfig
from hf_cifar.data.split import Split, prepare_split
from hf_cifar.data.stratify import representative_rows
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.evaluate import calibrate_classifier, evaluate_classifier, evaluating
from hf_cifar.evaluation.comparison import compare_predictions, render_difference
from hf_cifar.evaluation.predictions import Predictions, saved_splits
from hf_cifar.evaluation.tables import render_number
from hf_cifar.models.build import load_classifier
from hf_cifar.models.classifier import Classifier, class_names, describe
from hf_cifar.models.ensemble import EnsembleConfig, EnsembleForImageClassification, mean_logits
from hf_cifar.models.heads import divide_logits
from hf_cifar.models.rejection import forget_rejection, rejection_of
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.report.card import save_card
from hf_cifar.report.wording import describe_combined
from hf_cifar.run_data import open_data, used_splits
from hf_cifar.runs.environment import environment
from hf_cifar.runs.folder import RunFolder, new_folder, refuse_other_files, write_json
from hf_cifar.text import listed, render_table
from hf_cifar.training.dataset import store_of
from hf_cifar.training.saving import saved_weights
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
Batches = Callable[[], Iterator[Tensor]]
STATISTICS_IMAGES = 2_000  # of train, to compute the batch norm statistics of a soup
CROPS = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
VIEWS = {"image": ["image"], "flip": ["image", "flip"], "crops": ["image", "flip", *CROPS]}
# Facts of the first run that the combined run takes over.
SHARED_FACTS = (
    "model", "dataset", "source", "split_hash", "source_splits", "num_train", "num_validation",
    "skipped_rows", "value_range", "label_counts", "pixel_hashes",
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A finished run with its model."""

    run: RunFolder
    classifier: Classifier

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing.from_image_processor(self.classifier.image_processor)

    @property
    def class_names(self) -> list[str]:
        return class_names(self.classifier.model)


def combine_runs(folders: Sequence[str | Path], config: CombineConfig) -> dict[str, Any]:
    """Combine finished runs, and leave a run folder in `config.output_dir`.

    All choices are made on validation: the runs of a greedy soup, the views, and the temperature or
    thresholds. If the runs have different validation images, such as folds, some member was trained on each
    of these images, so nothing is chosen or evaluated on them. Returns what `render_combined` shows.

    Raises: UserError for runs that cannot be combined, or a folder with other files.
    """
    output = Path(config.output_dir)
    refuse_other_files(output)
    members = [load_member(folder) for folder in folders]
    check_members(members, config)
    if rejecting := [m.run.path.name for m in members if rejection_of(m.classifier.model)]:
        logger.warning(
            "the --reject thresholds of %s are left out: the combined run assigns a class to every image",
            listed(rejecting),
        )  # fmt: skip
    source = open_data(members[0].run, config.dataset_name)
    splits = used_splits(members[0].run, source)
    preprocessing, data = members[0].preprocessing, source.config
    validation = None
    if shares_validation(members):
        validation = prepare_split(
            splits.validation, preprocessing, kind=data.pixel_store, on_bad_image=data.on_bad_image
        )
    else:
        logger.warning(
            "the runs have different validation images, and other runs were trained on them, so nothing "
            "is evaluated on validation%s",
            "" if config.do_predict else "; pass --do_predict to evaluate on test",
        )  # fmt: skip

    def predict(model: PreTrainedModel, split: Split) -> Predictions:
        classifier = Classifier(model, members[0].classifier.image_processor)
        own = EvaluateConfig(
            per_device_eval_batch_size=config.per_device_eval_batch_size, use_cpu=config.use_cpu
        )
        with evaluating(classifier, own, decodes=data.pixel_store == "streamed") as trainer:
            return evaluate_classifier(trainer, split, store=store_of(split, trainer.args))

    used = members
    if config.method == "ensemble":
        models = [member.classifier.model for member in members]
    else:
        preprocessor = Preprocessor.of(*members[0].classifier)
        batches = statistics_batches(splits.train, preprocessor, config.per_device_eval_batch_size)

        def soup_of(chosen: Sequence[Member]) -> PreTrainedModel:
            return soup(chosen, batches)

        if config.method == "greedy_soup":
            assert validation is not None
            used = greedy(members, soup_of, lambda model: predict(model, validation))
        models = [soup_of(used)]
    views = chosen_views(config.views, models, used, predict, validation)
    model = models[0]
    if config.method == "ensemble" or views != ["image"]:
        model = ensemble_of(models, used if config.method == "ensemble" else used[:1], views)
    evaluations = []
    if validation is not None:
        evaluations.append(calibrate_classifier(model, predict(model, validation)))
    if config.do_predict:
        test = prepare_split(
            source.test_split, preprocessing, kind=data.pixel_store, on_bad_image=data.on_bad_image
        )
        evaluations.append(predict(model, test))
    facts = combined_facts(members, used, views, config, evaluations)
    save_run(output, model, members[0], facts, evaluations)
    return {
        "folder": str(output),
        "combined": facts["combined"],
        "members": {member.run.path.name: member.run.metrics() for member in members},
        "metrics": RunFolder(output).metrics(),
        "comparisons": comparisons(members, evaluations),
    }


def load_member(folder: str | Path) -> Member:
    """Load a finished run. Raises: UserError for anything else."""
    run = RunFolder(folder)
    run.require_finished()
    options = run.load_config().model
    return Member(run, load_classifier(str(folder), trust_remote_code=options.trust_remote_code))


def check_members(members: Sequence[Member], config: CombineConfig) -> None:
    """Raises: UserError for runs that the method cannot combine."""
    first, names = members[0], [member.run.path for member in members]
    if len(members) < 2 and config.views == "image":
        raise UserError(
            f"{first.run.path} alone cannot be combined; pass more runs, or --views flip"
        )
    if len({name.resolve() for name in names}) < len(names):
        raise UserError("a run is given twice; leave out one of them")
    for member in members[1:]:
        if member.class_names != first.class_names:
            raise UserError(
                f"{member.run.path} has the classes {listed(member.class_names, 5)}, and {first.run.path} "
                f"{listed(first.class_names, 5)}; combine runs of the same classes"
            )
        if problem_of(member) != problem_of(first):
            raise UserError(
                f"only one of {first.run.path} and {member.run.path} has multiple labels per image; combine "
                "runs of the same data"
            )
        if _shape(member.preprocessing) != _shape(first.preprocessing):
            raise UserError(
                f"{member.run.path} takes images of {_size(member)}, and {first.run.path} of {_size(first)}, "
                "or resizes them differently; combine runs with the same --image_size and --resize_mode"
            )
    if config.method != "ensemble":
        for member in members[1:]:
            if _tensors(member) != _tensors(first):
                raise UserError(
                    f"{member.run.path} is a {describe(member.classifier.model)} whose weights differ in "
                    f"name or shape from those of {first.run.path}; a soup needs runs of one network"
                )
    chooses = [
        f"--{name} {value}"
        for name, value, wanted in (
            ("method", config.method, "greedy_soup"), ("views", config.views, "auto"),
        ) if value == wanted
    ]  # fmt: skip
    if chooses and not shares_validation(members):
        raise UserError(
            f"{chooses[0]} chooses on validation, but the runs have different validation images, and other "
            "runs were trained on them; pass another value"
        )


def problem_of(member: Member) -> str:
    """Return the problem type of a run's model; an unset one is single-label."""
    return member.classifier.model.config.problem_type or "single_label_classification"


def shares_validation(members: Sequence[Member]) -> bool:
    """Return True if no run was trained on the validation images of another."""
    return len({member.run.facts().get("split_hash") for member in members}) == 1


def _shape(preprocessing: Preprocessing) -> Preprocessing:
    """Return the preprocessing without its normalisation, which an ensemble can undo."""
    return dataclasses.replace(preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3, rescale_factor=1.0)


def _size(member: Member) -> str:
    return "{} x {} px".format(*member.preprocessing.size)


def _tensors(member: Member) -> dict[str, torch.Size]:
    return {name: each.shape for name, each in member.classifier.model.state_dict().items()}


def ensemble_of(
    models: Sequence[PreTrainedModel], members: Sequence[Member], views: Sequence[str]
) -> EnsembleForImageClassification:
    """Return the ensemble of models, one for each member; its input is normalised as that of the first."""
    first, config = members[0].preprocessing, models[0].config
    scales, shifts = [], []
    for member in members:
        own = member.preprocessing
        # From (levels * f - m) / s of the first to (levels * f' - m') / s' of this one.
        ratio = own.rescale_factor / first.rescale_factor
        scales.append([ratio * s / t for s, t in zip(first.std, own.std, strict=True)])
        shifts.append(
            [(ratio * m - n) / t for m, n, t in zip(first.mean, own.mean, own.std, strict=True)]
        )
    shared = {
        name: value
        for name in ("id2label", "label2id", "problem_type", "value_range")
        if (value := getattr(config, name, None)) is not None
    }
    ensemble = EnsembleForImageClassification(
        EnsembleConfig(
            members=[model.config.to_dict() for model in models],
            scales=scales, shifts=shifts, views=views, **shared,
        )
    )  # fmt: skip
    for member, model in zip(ensemble.members, models, strict=True):
        member.load_state_dict(model.state_dict())
    return ensemble.eval()


def soup(members: Sequence[Member], batches: Batches) -> PreTrainedModel:
    """Return one network with the mean of the members' weights.

    Each member's temperature is first removed from its head. Batch norm statistics are recomputed on batches
    of training images if they differ between the members; frozen ones do not.
    """
    states = []
    for member in members:
        model = copy.deepcopy(member.classifier.model)
        divide_logits(model, 1 / float(member.run.facts().get("temperature", 1.0)))
        states.append(model.state_dict())
    mean = {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }
    model = copy.deepcopy(members[0].classifier.model)
    forget_rejection(model)
    model.load_state_dict(mean)
    statistics = [name for name in mean if name.endswith(("running_mean", "running_var"))]
    if any(not torch.equal(state[n], states[0][n]) for state in states for n in statistics):
        update_statistics(model, batches)
    return model.eval()


@torch.no_grad()
def update_statistics(model: nn.Module, batches: Batches) -> None:
    """Recompute the running statistics of all batch norms, as the mean over batches of images."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    for batch in batches():
        model(pixel_values=batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def statistics_batches(
    train: Split | Stream, preprocessor: Preprocessor, batch_size: int
) -> Batches:
    """Return a function that yields up to 2,000 training images [N, 3, H, W], stratified, as in evaluation.

    Raises: UserError for a stream.
    """
    if isinstance(train, Stream):
        raise UserError(
            "a soup needs training images for its batch norms, but the runs were trained on a stream; pass "
            "--method ensemble"
        )
    rows = representative_rows(train.labels, STATISTICS_IMAGES, seed=0)
    parts = np.array_split(rows, -(-len(rows) // batch_size))
    return lambda: (preprocessor([train.decode(row) for row in part.tolist()]) for part in parts)


def greedy(
    members: Sequence[Member],
    soup_of: Callable[[Sequence[Member]], PreTrainedModel],
    predict: Callable[[PreTrainedModel], Predictions],
) -> list[Member]:
    """Return the members of the greedy soup: added best first, each only if it does not lower the accuracy of
    the soup on validation."""
    accuracy = {
        member.run.path: Predictions.load(member.run.path, "validation").correct.mean()
        for member in members
    }
    ranked = sorted(members, key=lambda member: -accuracy[member.run.path])
    chosen, best = ranked[:1], accuracy[ranked[0].run.path]
    for member in ranked[1:]:
        found = predict(soup_of([*chosen, member])).correct.mean()
        kept = found >= best
        logger.info(
            "%s: accuracy of the soup on validation %.4f, without this run %.4f; %s",
            member.run.path.name, found, best, "kept" if kept else "left out",
        )  # fmt: skip
        if kept:
            chosen, best = [*chosen, member], found
    return chosen


def chosen_views(
    asked: str,
    models: Sequence[PreTrainedModel],
    members: Sequence[Member],
    predict: Callable[[PreTrainedModel, Split], Predictions],
    validation: Split | None,
) -> list[str]:
    """Return the views of each image; with auto, those with the lowest cross-entropy on validation."""
    if asked != "auto":
        return VIEWS[asked]
    assert validation is not None
    single = {
        view: predict(ensemble_of(models, members[: len(models)], [view]), validation)
        for view in VIEWS["crops"]
    }
    losses = {}
    for name, views in VIEWS.items():
        logits = torch.stack([torch.from_numpy(single[view].logits) for view in views])
        mean = mean_logits(logits, multi_label=single["image"].multi_label).numpy()
        found = dataclasses.replace(single["image"], logits=mean)
        losses[name] = found.outcome.metric("cross_entropy") or 0.0
    best = min(losses, key=losses.__getitem__)
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    logger.info("--views auto: cross-entropy on validation %s; %s is used", shown, best)
    return VIEWS[best]


def combined_facts(
    members: Sequence[Member],
    used: Sequence[Member],
    views: Sequence[str],
    config: CombineConfig,
    evaluations: Sequence[Predictions],
) -> dict[str, Any]:
    """Return the facts of the combined run: those that its members share, and how they were combined."""
    first = members[0].run.facts()
    names = [member.run.path.name for member in used]
    return {name: first[name] for name in SHARED_FACTS if name in first} | {
        "repo_id": Path(config.output_dir).resolve().name,
        "combined": {
            "method": config.method,
            "runs": names,
            "left_out": [m.run.path.name for m in members if m not in used],
            "views": list(views),
            "views_chosen": config.views == "auto",
            "has_validation": shares_validation(members),
        },
        "temperature": evaluations[0].temperature if evaluations else 1.0,
        "epochs": first["epochs"],
        "environment": environment(),
    }


def save_run(
    output: Path,
    model: PreTrainedModel,
    first: Member,
    facts: dict[str, Any],
    evaluations: Sequence[Predictions],
) -> None:
    """Write the combined run; nothing is left if that fails."""
    options = first.run.load_config().with_training(output_dir=str(output), run_name=None)
    with new_folder(output) as folder:
        model.save_pretrained(folder, state_dict=saved_weights(model, model.state_dict()))
        first.classifier.image_processor.save_pretrained(folder)
        run = RunFolder(folder)
        run.save_config(options)
        write_json(run.facts_path, facts)
        for evaluation in evaluations:
            evaluation.save(folder)
        if evaluations:
            save_card(folder)


def comparisons(
    members: Sequence[Member], evaluations: Sequence[Predictions]
) -> dict[str, dict[str, Any]]:
    """Compare the combined run with the member that is best on validation, by split."""
    found = {}
    best = max(members, key=lambda member: member.run.metrics()["validation"]["accuracy"])
    for evaluation in evaluations:
        if evaluation.split in saved_splits(best.run.path):
            before = Predictions.load(best.run.path, evaluation.split)
            found[evaluation.split] = {
                "best": best.run.path.name,
                **compare_predictions(before, evaluation),
            }
    return found


def render_combined(result: dict[str, Any]) -> str:
    """Render a text table of the members and the combined run, and the differences from the best member."""
    splits = list(result["metrics"])
    names = [(split, name) for split in splits for name in ("accuracy", "cross_entropy")]
    rows = [
        [run, *(_cell(metrics, *each) for each in names)]
        for run, metrics in [*result["members"].items(), (result["folder"], result["metrics"])]
    ]
    parts = (
        [render_table(["run", *(f"{split} {name}" for split, name in names)], rows)]
        if names
        else []
    )
    combined = result["combined"]
    lines = [describe_combined(combined)]
    if combined["left_out"]:
        lines.append(
            f"left out, because they would lower the accuracy on validation: {listed(combined['left_out'])}"
        )
    name = Path(result["folder"]).name
    for split, found in result["comparisons"].items():
        lines.append(f"{split}: {render_difference(found, (found['best'], name))}")
    return "\n\n".join([*parts, "\n".join([*lines, f"model: {result['folder']}"])])


def _cell(metrics: dict[str, Any], split: str, name: str) -> str:
    value = metrics.get(split, {}).get(name)
    return "-" if value is None else render_number(value)
