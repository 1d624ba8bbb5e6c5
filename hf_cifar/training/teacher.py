"""A teacher: a finished model that sees the images on which a student is trained."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from hf_cifar.config.run import RunConfig
from hf_cifar.data.cache import load_array, one_process_at_a_time, save_array
from hf_cifar.data.split import Split
from hf_cifar.data.store import PreparedStore, ResidentStore, images_of, take_batch
from hf_cifar.errors import UserError
from hf_cifar.models.build import load_classifier
from hf_cifar.models.classifier import Classifier, class_names, describe, label2id
from hf_cifar.models.fingerprint import model_hash
from hf_cifar.models.folding import fold_norms
from hf_cifar.models.heads import linear_head
from hf_cifar.models.names import check_teacher_name
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.models.value_range import value_range_of
from hf_cifar.progress import progress
from hf_cifar.runs.folder import RunFolder
from hf_cifar.text import listed
from hf_cifar.training.autotune import DTYPES, MEMORY_FORMATS, Setting
from hf_cifar.training.features import has_feature_vectors, head_inputs
from hf_cifar.transforms.preprocessing import Preprocessing
from hf_cifar.transforms.resampling import resample, whole_image

logger = logging.getLogger(__name__)
LOADED = 64  # images of a batch whose outputs are computed before training


class Outputs(NamedTuple):
    """A teacher's outputs for N images: logits [N, T] of its T classes, and features [N, D] or [N, 0]."""

    logits: Tensor
    features: Tensor


class Teacher:
    """A finished model that sees the images of a student.

    id2label: the student's classes, which include those of the teacher. columns: the student's ids of the
    teacher's classes, in the teacher's order. gives_features: `Outputs` include the features, which are the
    inputs of the head. setting: how the model computes; default: in float32.
    """

    def __init__(
        self,
        classifier: Classifier,
        id2label: dict[int, str],
        *,
        gives_features: bool = False,
        setting: Setting | None = None,
    ) -> None:
        of_class = label2id(id2label)
        self.columns = [of_class[label] for label in class_names(classifier.model)]
        self.gives_features, self.setting = gives_features, setting or Setting()
        self.memory_format = MEMORY_FORMATS[self.setting.memory_format]
        self.preprocessing = Preprocessing.from_image_processor(classifier.image_processor)
        model = classifier.model.float().eval()
        noise = torch.Generator().manual_seed(0)
        example = torch.randn(2, 3, *self.preprocessing.size, generator=noise)
        self.model = fold_norms(model, example.to(model.device)).requires_grad_(False)
        self.model.to(memory_format=self.memory_format)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, student: Preprocessing) -> Outputs:
        """Compute the outputs for the `pixel_values` [N, 3, h, w] of a student."""
        images = self.view(pixel_values, student).contiguous(memory_format=self.memory_format)
        dtype = DTYPES[self.setting.precision]
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                torch.autocast(images.device.type, dtype, enabled=dtype is not torch.float32)
            )
            seen = []
            if self.gives_features:
                head = linear_head(self.model)
                assert head is not None  # see `check_teacher`
                seen = stack.enter_context(head_inputs(head))
            logits = self.model(pixel_values=images).logits.float()
        return Outputs(logits, seen[0].float() if seen else logits.new_empty(len(logits), 0))

    def view(self, pixel_values: Tensor, student: Preprocessing) -> Tensor:
        """Resize and normalise the `pixel_values` [N, 3, h, w] of a student for the teacher."""
        own, device = self.preprocessing, pixel_values.device
        scale, shift = (each.view(1, -1, 1, 1) for each in student.levels(device))
        images = (pixel_values.float() - shift) / scale
        if images.shape[2:] == own.size:
            return own.normalize(images)
        box = whole_image(*images.shape[2:])
        return resample(
            images, box, own.size, own.interpolation, own.levels(device), self.memory_format
        )

    def digest(self) -> str:
        """Return the SHA-256 of the model and its preprocessing, wherever its folder is."""
        return model_hash(self.model, self.preprocessing.to_dict())


class FixedOutputs:
    """The outputs for each image of a split whose view is always the same, computed once.

    outputs: for the rows `row_ids` [N], in that order.
    """

    def __init__(self, outputs: Outputs, row_ids: Tensor) -> None:
        self.outputs = outputs
        self.places = row_ids.new_full((int(row_ids.max()) + 1,), -1)
        self.places[row_ids] = torch.arange(len(row_ids), device=row_ids.device)

    def of(self, row_ids: Tensor) -> Outputs:
        """Return the outputs for these rows [B]."""
        places = self.places[row_ids.to(self.places.device)]
        return Outputs(self.outputs.logits[places], self.outputs.features[places])


def check_teacher(
    config: RunConfig,
    id2label: dict[int, str],
    student: PreTrainedModel,
    preprocessing: Preprocessing,
) -> None:
    """Raises: UserError for a teacher that cannot teach a model with these classes."""
    if config.train.teacher is not None:
        load_teacher(config, id2label, student, preprocessing)


def load_teacher(
    config: RunConfig,
    id2label: dict[int, str],
    student: PreTrainedModel,
    preprocessing: Preprocessing,
) -> Classifier:
    """Load the teacher of a run. id2label: the classes of the data. preprocessing: the student's.

    Raises: UserError for a teacher of other classes or another kind of images, or without the features that
    --feature_hint needs.
    """
    name = config.train.teacher
    assert name is not None
    check_teacher_name(name, trust_remote_code=config.model.trust_remote_code)
    classifier = load_classifier(name, trust_remote_code=config.model.trust_remote_code)
    model = classifier.model
    if unknown := [label for label in class_names(model) if label not in id2label.values()]:
        raise UserError(
            f"--teacher {name} has the classes {listed(unknown, 5)}, which are not in the data; pass a model "
            "fine-tuned on the classes of the data"
        )
    if is_multi_label(model) != is_multi_label(student):
        kinds = ("one label", "any number of labels")
        raise UserError(
            f"--teacher {name} gives an image {kinds[is_multi_label(model)]}, but in the data it has "
            f"{kinds[is_multi_label(student)]}; pass a model fine-tuned on such data"
        )
    if value_range_of(model) != value_range_of(student):
        raise UserError(
            f"--teacher {name} was trained on images with another range of values; pass a model fine-tuned "
            "on these images"
        )
    hint = config.train.feature_hint > 0
    of_teacher = Preprocessing.from_image_processor(classifier.image_processor)
    for each, view in ((model, of_teacher), (student, preprocessing)):
        if hint and (linear_head(each) is None or not has_feature_vectors(each, view)):
            raise UserError(
                "--feature_hint needs models whose head is one linear layer, and "
                f"{describe(each)} has another kind of head; leave it out"
            )
    return classifier


def outputs_of(
    teacher: Teacher,
    split: Split,
    store: ResidentStore | PreparedStore,
    preprocessing: Preprocessing,
    num_workers: int = 0,
) -> FixedOutputs:
    """Compute the outputs for each image of a split, as in evaluation, or load them from the disk cache.

    preprocessing: the student's. Only one process on a machine computes them; the others wait.
    """
    pixels = images_of(split).pixel_hash or split.pixels.key_of(split.rows)
    details = (pixels, teacher.digest(), teacher.setting, teacher.gives_features, preprocessing)
    key = hashlib.sha256(str(details).encode()).hexdigest()
    num_classes, device = len(teacher.columns), teacher.model.device
    with one_process_at_a_time(key):
        found = load_array(key)
        if found is None:
            found = _computed(teacher, split, store, preprocessing, num_workers)
            save_array(key, found)
    array = torch.from_numpy(found).to(device)
    outputs = Outputs(array[:, :num_classes], array[:, num_classes:])
    return FixedOutputs(outputs, torch.from_numpy(split.row_ids).to(device))


def _computed(
    teacher: Teacher,
    split: Split,
    store: ResidentStore | PreparedStore,
    preprocessing: Preprocessing,
    num_workers: int,
) -> np.ndarray:
    """Compute logits and features [N, T + D], in the order of the split; NaN for unreadable images."""
    loader = DataLoader(store, batch_size=LOADED, num_workers=num_workers, collate_fn=take_batch)
    rows, parts = [], []
    for batch in progress(loader, "computing the teacher's outputs", unit="batches"):
        pixel_values = preprocessing(batch["pixel_values"].to(teacher.model.device))
        parts.append(torch.cat(teacher(pixel_values, preprocessing), dim=1).cpu())
        rows.append(batch["row_ids"].cpu())
    found = torch.cat(parts).numpy()
    whole = np.full((len(split), found.shape[1]), np.nan, np.float32)
    whole[np.isin(split.row_ids, torch.cat(rows).numpy())] = found
    return whole


def facts_of_teacher(config: RunConfig, split_hash: str) -> dict[str, object] | None:
    """Return what a run records about its teacher; None without one.

    has_seen_validation: True if the teacher, which is a run on this machine, or its own teacher was trained
    on another split, and so perhaps on validation images of this run; None if unknown.
    """
    train = config.train
    if train.teacher is None:
        return None
    folder = RunFolder(train.teacher)
    recorded = folder.facts().get("split_hash")
    held_out = folder.facts().get("combined", {}).get("has_validation", True)
    own = (folder.facts().get("teacher") or {}).get("has_seen_validation")
    seen = None if recorded is None else recorded != split_hash or not held_out or bool(own)
    return {
        "name": folder.path.name if seen is not None else train.teacher,
        "has_seen_validation": seen,
    }
