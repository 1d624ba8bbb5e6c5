"""Examine a data set and a recipe before training: refusals, images, classes, duplicates, labels, cost.

It runs the checks of `finetune_classifier` in the same order, and continues after a refusal with every check
that does not need what is missing. Only the pixels of test are read, as with --check_leakage.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import BaseImageProcessor, PreTrainedModel, set_seed

from hf_cifar.audit.duplicates import compare_fingerprints
from hf_cifar.audit.findings import (
    Example,
    Finding,
    Level,
    class_findings,
    duplicate_findings,
    image_findings,
    telling_properties,
)
from hf_cifar.audit.survey import Survey, survey_split
from hf_cifar.config.run import RunConfig
from hf_cifar.data.labels import class_counts
from hf_cifar.data.split import Split, UnreadableImages, without
from hf_cifar.data.splits import DataSource, Splits, require_every_class_of
from hf_cifar.doctor.cost import cost_findings, measure_cost
from hf_cifar.doctor.refusals import Refusals
from hf_cifar.doctor.suspects import doubted
from hf_cifar.errors import UserError
from hf_cifar.hub.push import check_card
from hf_cifar.models.build import build_model
from hf_cifar.models.names import check_model_name
from hf_cifar.plan import Plan, plan_run
from hf_cifar.preflight import check_device, check_output, check_space, draft_card, request_checks
from hf_cifar.record import known_facts
from hf_cifar.runs.processes import computes_on_cpu
from hf_cifar.training.build import imbalance
from hf_cifar.training.race import GUESS

logger = logging.getLogger(__name__)
# Near duplicates are not searched for among more images: every image is compared with every other one.
MOST_COMPARED = 100_000
# Images that are smaller than the model's input by this factor cost more time than they have detail.
ENLARGED = 3
Built = tuple[PreTrainedModel, BaseImageProcessor]


@dataclass(frozen=True, eq=False)
class Examination:
    """What was found: plain values; the findings, errors first; and the surveys, by name of the split."""

    facts: dict[str, Any]
    findings: list[Finding]
    surveys: dict[str, Survey]

    @property
    def refused(self) -> bool:
        """True if training would be refused."""
        return any(each.level == "error" for each in self.findings)


def examine(config: RunConfig) -> Examination:
    """Examine the data and the recipe of a run. No training is completed, and nothing is written except
    prepared images and features in the cache."""
    start, seeds = time.perf_counter(), config.train.seeds
    config = config.with_training(seeds=1)
    refusals, source = Refusals(), DataSource(config.data)
    facts: dict[str, Any] = {"dataset_name": str(config.data.dataset_name)}
    with refusals.noting():
        check_output(config)
    with refusals.noting():
        check_device(config)
    model = config.model
    with refusals.noting():
        check_model_name(
            model.model_name_or_path, model.model_revision, trust_remote_code=model.trust_remote_code
        )  # fmt: skip
    splits, findings, surveys = None, [], {}
    with refusals.noting(), refusals.hearing():
        splits = source.splits
    if splits is None:
        return _examination(facts, refusals, [], {}, start)
    facts["source"] = source.facts
    for check in request_checks(config, source):
        with refusals.noting():
            check()
    if isinstance(splits.train, Split):
        surveys = {each.name: survey_split(each) for each in (splits.train, splits.validation)}
        if (test := _test_of(source)) is not None:
            surveys["test"] = survey_split(test)
        findings += _unreadable(surveys, config, refusals)
        findings += _of_data(surveys, config)
        facts |= _data_facts(surveys)
        splits = Splits(surveys["train"].good, surveys["validation"].good)
    else:
        findings.append(_stream_note(config))
    built, plan = _prepared(config, source, splits, refusals)
    if built is not None and "train" in surveys:
        findings += _enlarged(surveys["train"], built[1])
    enough = isinstance(splits.train, Split) and len(splits.train) and len(splits.validation)
    if enough:
        facts["labels"], found = doubted(surveys["train"], config, built)
        findings += found
    if enough and built is not None and plan is not None:
        with refusals.noting():
            facts["cost"] = measure_cost(*built, splits, plan, seeds)
            findings += cost_findings(facts["cost"])
    return _examination(facts, refusals, findings, surveys, start)


def _examination(
    facts: dict[str, Any],
    refusals: Refusals,
    findings: Sequence[Finding],
    surveys: dict[str, Survey],
    start: float,
) -> Examination:
    every = [*refusals.findings, *findings]
    order = {"error": 0, "warning": 1, "note": 2}
    every.sort(key=lambda finding: order[finding.level])
    facts["seconds"] = time.perf_counter() - start
    facts["refused"] = any(each.level == "error" for each in every)
    facts["findings"] = [
        {
            "level": each.level, "name": each.name, "text": each.text, "action": each.action,
            "images": [_plain(example, surveys) for example in each.examples],
        }
        for each in every
    ]  # fmt: skip
    return Examination(facts, every, surveys)


def _plain(example: Example, surveys: dict[str, Survey]) -> dict[str, Any]:
    return {
        "rows": [describe(*place, surveys) for place in example.places],
        "note": example.note,
    }


def describe(name: str, position: int, surveys: dict[str, Survey]) -> dict[str, Any]:
    """Identify an image: split and row in the source, its file, if any, and its label, except for test."""
    split = surveys[name].split
    found = {
        "split": split.source_split, "row": int(split.row_ids[position]), "path": split.path_of(position),
        "used_as": name, "label": None,
    }  # fmt: skip
    if name != "test":
        label = split.labels[position]
        ids = [int(label)] if split.labels.ndim == 1 else np.flatnonzero(label).tolist()
        found["label"] = ", ".join(split.id2label[each] for each in ids)
    return found


def _test_of(source: DataSource) -> Split | None:
    """Return test, of which only pixels are read; None if there is no labelled test split."""
    try:
        return source.test_split
    except UserError:
        return None


def _unreadable(surveys: dict[str, Survey], config: RunConfig, refusals: Refusals) -> list[Finding]:
    """Note unreadable images as `prepare_splits` and `prepare_split` report them; return those that do not
    stop training."""
    found = []
    reads_test = config.train.do_predict or config.train.check_leakage
    for names in (("train", "validation"), ("test",)):
        bad = [
            (surveys[n].split, surveys[n].faults)
            for n in names
            if surveys.get(n) and surveys[n].faults
        ]
        if not bad:
            continue
        examples = tuple(
            Example(((split.name, position),), faults[position])
            for split, faults in bad
            for position in sorted(faults)
        )
        level: Level = "error"
        text = str(UnreadableImages(bad))
        if config.data.on_bad_image == "skip":
            level, text = "warning", text.replace("; fix or remove", "; left out; fix or remove")
            text = text.removesuffix(", or pass --on_bad_image skip")
        elif names == ("test",) and not reads_test:
            level = "warning"
        found.append(Finding(level, "unreadable images", text, "", examples))
    if config.data.on_bad_image != "skip":
        return found
    with refusals.noting():
        for name in ("train", "validation"):
            without(surveys[name].split, surveys[name].faults)  # raises if none is left
        train = surveys["train"]
        classes = list(train.split.id2label.values())
        require_every_class_of(train.good.labels, classes, train.split.source_split)
    return found


def _of_data(surveys: dict[str, Survey], config: RunConfig) -> list[Finding]:
    """Return the findings about images, classes and duplicates."""
    train, validation = surveys["train"], surveys["validation"]
    found = [each for survey in surveys.values() for each in image_findings(survey)]
    found += telling_properties(train)
    found += class_findings(train, validation)
    single = train.split.labels.ndim == 1
    if (
        single
        and config.train.class_balance == "none"
        and (advice := imbalance(train.split, config.train))
    ):
        found.append(Finding("warning", "imbalance", advice))
    near = sum(len(survey.split) for survey in surveys.values()) <= MOST_COMPARED
    if not near:
        text = f"near duplicates were not searched for, because there are more than {MOST_COMPARED:,} images"
        found.append(
            Finding(
                "note", "near duplicates", text, "pass --max_train_samples to search some images"
            )
        )
    found += duplicate_findings(train, train, compare_fingerprints(train.prints, near=near))
    for first, second in (("validation", "train"), ("test", "train"), ("test", "validation")):
        if first in surveys:
            pair = surveys[first], surveys[second]
            pairs = compare_fingerprints(pair[0].prints, pair[1].prints, near=near)
            found += duplicate_findings(*pair, pairs, compare_labels=first != "test")
    return found


def _data_facts(surveys: dict[str, Survey]) -> dict[str, Any]:
    """Return counts of images and classes, and sizes, as plain values."""
    facts: dict[str, Any] = {"splits": {}, "classes": {}}
    for name, survey in surveys.items():
        size = survey.size[survey.readable]
        facts["splits"][name] = {
            "num_images": len(survey.split), "unreadable": len(survey.faults),
            "source_split": survey.split.source_split, "grey": int(survey.grey.sum()),
            "alpha": int(survey.alpha.sum()), "more_than_8_bits": int(survey.deep.sum()),
            "blank": int(survey.blank.sum()),
        }  # fmt: skip
        if len(size):
            facts["splits"][name]["height_width"] = {
                "smallest": size[size.prod(axis=1).argmin()].tolist(),
                "median": np.median(size, axis=0).astype(int).tolist(),
                "largest": size[size.prod(axis=1).argmax()].tolist(),
                "num_sizes": len(np.unique(size, axis=0)),
            }
        if name != "test":  # of which only pixels are read
            counts = class_counts(survey.good.labels, len(survey.split.id2label))
            facts["classes"][name] = dict(
                zip(survey.split.id2label.values(), counts.tolist(), strict=True)
            )
    return facts


def _prepared(
    config: RunConfig, source: DataSource, splits: Splits, refusals: Refusals
) -> tuple[Built | None, Plan | None]:
    """Build the model and plan the run, as far as both are possible."""
    built = plan = None
    set_seed(config.train.seed)
    # A race would take a tenth of the run, and measuring precisions takes minutes if the compiler is tried.
    changes: dict[str, Any] = {}
    if config.train.learning_rate == "auto":
        changes["learning_rate"] = GUESS  # any has the same cost
    if config.train.precision == "auto" and not (config.train.bf16 or config.train.fp16):
        changes["precision"] = "fp32" if computes_on_cpu(config.train.use_cpu) else "bf16"
    with refusals.noting():
        built = build_model(
            config.model, splits.id2label, multi_label=splits.multi_label, value_range=source.value_range
        )  # fmt: skip
    if built is None:
        return None, None
    with refusals.noting():
        check_space(config, built[0])
    with refusals.noting():
        plan = plan_run(config.with_training(**changes), *built, splits)
        plan = dataclasses.replace(plan, requested=config)  # which the cost reads
        known = known_facts(source, splits, None, plan.config)
        check_card(draft_card(plan.config, built[0], known))
    return built, plan


def _enlarged(train: Survey, image_processor: BaseImageProcessor) -> list[Finding]:
    """Return a note if the model's input is much larger than the images."""
    from hf_cifar.transforms.preprocessing import Preprocessing

    side, size = (
        min(Preprocessing.from_image_processor(image_processor).size),
        train.size[train.readable],
    )
    median = int(np.median(size.min(axis=1))) if len(size) else side
    if side < ENLARGED * median:
        return []
    return [
        Finding(
            "note", "enlarged images",
            f"images of {median} px are enlarged to the model's {side} px",
            f"a smaller --image_size, such as {ENLARGED * median}, costs less; compare both",
        )
    ]  # fmt: skip


def _stream_note(config: RunConfig) -> Finding:
    return Finding(
        "note", "stream",
        f"{config.data.dataset_name} is streamed, so its training images were not examined",
        "pass --max_train_samples instead of --streaming to examine some of them",
    )  # fmt: skip
