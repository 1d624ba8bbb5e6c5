"""Data sets of a Trainer that is used by itself: labels of the model's classes, images prepared once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset, IterableDatasetDict, List
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, ProcessorMixin, TrainingArguments

from hf_cifar.config.data import DataConfig
from hf_cifar.config.objects import MEMORY
from hf_cifar.data.columns import quiet_datasets, standard_split
from hf_cifar.data.labels import (
    LABEL_NAMES,
    SHOWN_CLASSES,
    class_label,
    holds_lists,
    is_hidden,
    label_names,
    with_known_classes,
)
from hf_cifar.data.objects import open_object
from hf_cifar.data.pixels import Pixels
from hf_cifar.data.split import Split, prepare_split
from hf_cifar.data.splits import range_of_rows, requested_range
from hf_cifar.data.store import (
    CPU,
    PreparedStore,
    ResidentStore,
    ShardStore,
    build_store,
    default_num_workers,
)
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.evaluation.corruptions import CorruptedStore
from hf_cifar.models.build import wrap_network
from hf_cifar.models.classifier import Classifier, class_names, label2id
from hf_cifar.models.objects import is_timm, processor_of
from hf_cifar.models.problem_type import is_multi_label, set_problem
from hf_cifar.models.value_range import set_value_range, value_range_of
from hf_cifar.text import listed
from hf_cifar.training.arguments import set_workers
from hf_cifar.training.features import FeatureStore
from hf_cifar.training.resumable import identity_of
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
STORES = (ResidentStore, PreparedStore, ShardStore, FeatureStore, CorruptedStore)
HALF = (torch.float16, torch.bfloat16)
IN_MEMORY = f"{MEMORY}dataset"  # no name of a folder, to which paths would be relative


def is_several(given: Any) -> bool:
    """True for a dict of data sets, which a Trainer evaluates one after another; False for one of columns."""
    kinds = (Dataset, IterableDataset, Split, *STORES)
    return isinstance(given, Mapping) and all(isinstance(each, kinds) for each in given.values())


def opened(given: Any, name: str, data: DataConfig) -> Any:
    """Open a data set of any kind in memory as a split, with its labels as they are; return None and
    stores unchanged.

    Raises: UserError for an object that is not a data set, or columns that cannot be identified.
    """
    if given is None or isinstance(given, (Split, *STORES)):
        return given
    if isinstance(given, (DatasetDict, IterableDatasetDict)):
        raise UserError(
            f"{name} is a {type(given).__name__} of {', '.join(given)}; pass one of them, as ds[{name!r}]"
        )
    if isinstance(given, str):
        raise UserError(
            f"{name} is the string {given!r}; pass a datasets.Dataset, such as one from load_dataset"
        )
    rows = open_object({"train": given})["train"]
    rows = standard_split(rows, name, replace(data, dataset_name=IN_MEMORY))
    if not len(rows):
        raise UserError(f"{name} has no images; pass another data set")
    return Split(name, Pixels(name, rows, None, data.max_image_pixels), np.arange(len(rows)))


def lacks_labels(given: Any, data: DataConfig) -> bool:
    """True for a `Dataset` without a label column, or with one that has no label."""
    if not isinstance(given, Dataset) or data.label_column_name is not None:
        return False
    if not any(
        isinstance(class_label(feature), ClassLabel) or name.casefold() in LABEL_NAMES
        for name, feature in given.features.items()
    ):
        return True
    rows = standard_split(given, "test", replace(data, dataset_name=IN_MEMORY))
    return bool(len(rows)) and is_hidden(rows)


def with_placeholders(given: Dataset, model: PreTrainedModel, data: DataConfig) -> Split:
    """Open a data set without labels as a split in which every label is the first class, or none."""
    label: Any = ClassLabel(names=class_names(model))
    values: list[Any] = [0] * len(given)
    if is_multi_label(model):
        label, values = List(label), [[]] * len(given)
    others = {n for n in given.features if n.casefold() in LABEL_NAMES}
    others |= {n for n, f in given.features.items() if isinstance(class_label(f), ClassLabel)}
    with quiet_datasets():
        rows = given.remove_columns(list(others)).add_column("label", values, feature=label)
    return opened(rows, "test", data)


def as_classifier(model: nn.Module, processing_class: Any, split: Split | None) -> Classifier:
    """Return a transformers model with its image processor; wrap any other network for the split.

    Raises: UserError for a network without class names, or whose input size is unknown.
    """
    processor = processing_class
    if isinstance(processor, ProcessorMixin):
        processor = processor.image_processor
    if not isinstance(processor, BaseImageProcessor | None):
        raise UserError(
            f"processing_class is a {type(processor).__name__}; pass the model's image processor, or "
            "leave it out"
        )
    if isinstance(model, PreTrainedModel):
        return Classifier(model, processor or processor_of(model))
    if split is None:
        raise UserError(
            f"a {type(model).__name__} has no class names; pass train_dataset, or a transformers model"
        )
    count = model.num_classes if is_timm(model) else None
    names = _names_by_number(split, count)
    lists = holds_lists(split.rows.features["label"])
    return wrap_network(model, processor, dict(enumerate(names)), multi_label=lists)


def _names_by_number(split: Split, count: int | None) -> list[str]:
    """Names of the classes of a split, so that class `i` of a model of `count` classes is `names[i]`."""
    names = label_names(split.rows, split.name)
    is_declared = isinstance(class_label(split.rows.features["label"]), ClassLabel)
    if not is_declared and count is not None and all(name.isdigit() for name in names):
        names = [str(i) for i in range(max(count, int(names[-1]) + 1))]
    return names


def complete_config(model: PreTrainedModel, split: Split) -> None:
    """Complete a model's config from a data set: the names of its classes, if they have none, and whether an
    image may have multiple labels.

    Raises: UserError for another number of classes.
    """
    _name_classes(model, split)
    if holds_lists(split.rows.features["label"]) and model.config.problem_type is None:
        logger.info("%s has lists of labels: the model assigns any number of them", split.name)
        set_problem(model, multi_label=True)


def train_as_float32(model: PreTrainedModel) -> None:
    """Convert half-precision weights to float32, because half precision would lose small updates."""
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype in HALF}
    if kinds:
        logger.info(
            "the model's weights are %s, and are trained as float32", " and ".join(sorted(kinds))
        )
        model.float()


def set_range_of(model: PreTrainedModel, train: Split, data: DataConfig) -> None:
    """Record the range of training images of more than 8 bits in a model's config."""
    is_requested = data.value_range is not None
    set_value_range(
        model, requested_range(data) if is_requested else range_of_rows(train.rows, data)
    )


def _name_classes(model: PreTrainedModel, split: Split) -> None:
    """Name the classes of a model that has only LABEL_0, LABEL_1, ... after those of the data."""
    count = model.config.num_labels
    generic = [f"LABEL_{i}" for i in range(count)]
    if class_names(model) != generic:
        return
    names = _names_by_number(split, count)
    if set(names) <= set(generic):
        return
    is_declared = isinstance(class_label(split.rows.features["label"]), ClassLabel)
    if len(names) > count or (len(names) < count and not is_declared):
        raise UserError(
            f"{split.name} has {len(names)} classes, {listed(names, SHOWN_CLASSES)}, but the model has "
            f"{count} without names; load it with num_labels={len(names)}"
        )
    if len(names) < count:
        logger.warning(
            "%s has %d classes and the model %d: the last %d have no images",
            split.name, len(names), count, count - len(names),
        )  # fmt: skip
    logger.info("the model's classes had no names and are now %s", listed(names, SHOWN_CLASSES))
    names = [*names, *generic[len(names) :]]
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = label2id(model.config.id2label)


def matched_split(split: Split, model: PreTrainedModel, data: DataConfig) -> Split:
    """Return a split with the classes of a model, matched by name, and its range of values.

    Raises: UserError that lists the classes that the model does not know, or for another number of labels per
    image than the model's.
    """
    lists, kinds = holds_lists(split.rows.features["label"]), ("one label", "multiple labels")
    if lists != is_multi_label(model):
        raise UserError(
            f"{split.name} has {kinds[lists]} per image, but the model assigns {kinds[not lists]}; set "
            "problem_type in its config, or pass other labels"
        )
    names, values = class_names(model), value_range_of(model)
    advice = (
        'rename them, or name the numbers with ds.cast_column("label", ClassLabel(names=[...]))'
    )
    rows = with_known_classes(split.rows, names, split.name, advice)
    if rows is split.rows and split.pixels.value_range == values:
        return split
    pixels = Pixels(split.source_split, rows, split.row_ids, data.max_image_pixels, values)
    return Split(split.name, pixels, np.arange(len(rows)), split.skipped)


def prepared(
    split: Split,
    preprocessing: Preprocessing,
    data: DataConfig,
    device: torch.device,
    *,
    augmented: bool = False,
) -> Split:
    """Return a split with its images in the form that the model needs, unless it has them."""
    found = split.images
    if found and (found.preprocessing, found.augmented) == (preprocessing, augmented):
        return split
    return prepare_split(
        split, preprocessing,
        augmented=augmented, kind=data.pixel_store, on_bad_image=data.on_bad_image, device=device,
    )  # fmt: skip


class Inputs(NamedTuple):
    """What a Trainer needs. train, evaluation: stores, the latter also by name. identity: `identity_of`."""

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    preprocessing: Preprocessing
    train: Any
    evaluation: Any
    identity: dict[str, Any] | None


def prepare_inputs(
    model: nn.Module,
    processing_class: Any,
    train_dataset: Any,
    eval_dataset: Any,
    args: TrainingArguments,
    data: DataConfig,
    preprocessing: Preprocessing | None = None,
) -> Inputs:
    """Open the data sets, match their classes, prepare their images, and set the loader's workers in `args`.

    Stores already have all of that, and stay unchanged.
    """
    train = opened(train_dataset, "train", data)
    evals = {name: opened(each, name, data) for name, each in _by_name(eval_dataset).items()}
    given = [each for each in (train, *evals.values()) if isinstance(each, Split)]
    model, processor = as_classifier(model, processing_class, given[0] if given else None)
    preprocessing = preprocessing or Preprocessing.from_image_processor(processor)
    if given:
        complete_config(model, given[0])
    if isinstance(train, Split):
        train_as_float32(model)
        set_range_of(model, train, data)
        train = matched_split(train, model, data)
        train = prepared(train, preprocessing, data, args.device, augmented=True)
    evals = {
        name: prepared(matched_split(each, model, data), preprocessing, data, args.device)
        if isinstance(each, Split)
        else each
        for name, each in evals.items()
    }
    identity = None
    if splits := [each for each in (train, *evals.values()) if isinstance(each, Split)]:
        set_workers(args, default_num_workers(decodes=any_decodes(splits)))
        identity = identity_of(splits, model.config.id2label)
    train, *stores = [
        store_of(each, args) if isinstance(each, Split) else each
        for each in (train, *evals.values())
    ]
    named = dict(zip(evals, stores, strict=True))
    evaluation = named if is_several(eval_dataset) else stores[0]
    return Inputs(model, processor, preprocessing, train, evaluation, identity)


def prepare_evaluation(
    model: PreTrainedModel,
    given: Any,
    name: str,
    args: TrainingArguments,
    data: DataConfig,
    preprocessing: Preprocessing,
) -> Any:
    """Return the store of a data set to evaluate, or multiple by name; return None and stores unchanged."""
    if is_several(given):
        return {
            each: prepare_evaluation(model, given[each], each, args, data, preprocessing)
            for each in given
        }
    split = opened(given, name, data)
    if not isinstance(split, Split):
        return split
    split = matched_split(split, model, data)
    return store_of(prepared(split, preprocessing, data, args.device), args)


def _by_name(eval_dataset: Any) -> dict[str, Any]:
    return dict(eval_dataset) if is_several(eval_dataset) else {"validation": eval_dataset}


def any_decodes(splits: Iterable[Split | Stream]) -> bool:
    """True if images are decoded while the model computes."""
    return any(
        isinstance(split, Stream) or (split.images is not None and split.images.decodes)
        for split in splits
    )


def store_of(
    split: Split, args: TrainingArguments, *, skips: bool = False
) -> ResidentStore | PreparedStore:
    """Return the store of a split's prepared images. skips: see `PreparedStore`."""
    # A worker process must not touch a GPU.
    device = args.device if args.dataloader_num_workers == 0 else CPU
    return build_store(split, device=device, skips=skips)
