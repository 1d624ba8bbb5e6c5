"""Distillation: a model learns the probabilities that a teacher gives each image, as well as its label.

The teacher sees the same pixels as the model: the same random view, resized and normalised for the teacher.
If the view of each image is always the same, the teacher's outputs are computed once.
Sources: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Beyer et al., Knowledge
Distillation: A Good Teacher Is Patient and Consistent, 2022; Tung and Mori, Similarity-Preserving Knowledge
Distillation, 2019.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from hf_cifar.data.split import Split
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.models.heads import linear_head
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.training.augmenting import augmentation
from hf_cifar.training.features import head_inputs
from hf_cifar.training.teacher import FixedOutputs, Outputs, Teacher, load_teacher, outputs_of
from hf_cifar.transforms.preprocessing import Preprocessing

if TYPE_CHECKING:  # hf_cifar.plan imports this package
    from hf_cifar.plan import Plan

logger = logging.getLogger(__name__)


class Distillation:
    """The part of the training loss that a teacher adds; without a teacher, nothing changes.

    The loss becomes (1 - weight) * loss + weight * T^2 * KL(teacher || student) + feature_hint * (distance
    between the similarities of the batch's images), see `divergence` and `similarity_distance`. Both models'
    probabilities are at temperature T, and for the teacher's classes. fixed: the teacher's outputs, if they
    have been computed.
    """

    def __init__(
        self,
        teacher: Teacher | None = None,
        *,
        weight: float = 0.9,
        temperature: float = 8.0,
        feature_hint: float = 0.0,
        fixed: FixedOutputs | None = None,
    ) -> None:
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self.feature_hint, self.fixed = feature_hint, fixed

    @property
    def identity(self) -> dict[str, str]:
        """What must not change when the run is resumed."""
        return {} if self.teacher is None else {"teacher": self.teacher.digest()}

    def outputs(
        self, pixel_values: Tensor, row_ids: Tensor | None, student: Preprocessing
    ) -> Outputs | None:
        """Return the teacher's outputs for a batch of the student, or None without a teacher."""
        if self.teacher is None:
            return None
        if self.fixed is not None and row_ids is not None:
            return self.fixed.of(row_ids)
        return self.teacher(pixel_values, student)

    @contextlib.contextmanager
    def features_of(self, model: PreTrainedModel) -> Iterator[list[Tensor]]:
        """Collect the features of the student, if there is a hint, until the block ends."""
        head = linear_head(model) if self.teacher is not None and self.feature_hint else None
        if head is None:
            yield []
            return
        with head_inputs(head) as seen:
            yield seen

    def __call__(
        self, loss: Tensor, logits: Tensor, features: list[Tensor], outputs: Outputs | None
    ) -> Tensor:
        """Return the loss of a batch with the teacher's part. loss: of the labels; logits [N, K]."""
        if outputs is None or self.teacher is None:
            return loss
        own, multi_label = logits[:, self.teacher.columns], is_multi_label(self.teacher.model)
        distance = divergence(own, outputs.logits, self.temperature, multi_label=multi_label)
        loss = (1 - self.weight) * loss + self.weight * distance
        if self.feature_hint:
            (own_features,) = features
            hint = similarity_distance(own_features.float(), outputs.features)
            loss = loss + self.feature_hint * hint
        return loss


def divergence(
    logits: Tensor, teacher: Tensor, temperature: float, *, multi_label: bool = False
) -> Tensor:
    """Return T^2 * KL(teacher || student) at temperature T, the mean over images. logits, teacher [N, K].

    With T^2, the gradients keep their size when T changes. multi_label: each class has its own probability,
    and the mean is over classes too, like the loss of the labels.
    """
    own, others = logits / temperature, teacher / temperature
    if not multi_label:
        found = F.kl_div(
            F.log_softmax(own, dim=1), F.log_softmax(others, dim=1),
            reduction="batchmean", log_target=True,
        )  # fmt: skip
    else:
        targets = others.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(others, targets)
        found = F.binary_cross_entropy_with_logits(own, targets) - entropy
    return temperature**2 * found


def similarity_distance(features: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance between the similarities of N images, divided by N^2.

    features [N, D], teacher [N, E]; D and E may differ. The similarities are scalar products, with each row
    scaled to length 1.
    """
    own, others = (F.normalize(each @ each.T, dim=1) for each in (features, teacher))
    return (own - others).square().sum() / len(features) ** 2


def build_distillation(
    model: PreTrainedModel,
    train: Split | Stream,
    store: Any,
    preprocessing: Preprocessing,
    args: TrainingArguments,
    plan: Plan,
) -> Distillation:
    """Return the distillation of a planned run, with its teacher on the device of the training."""
    config, options = plan.config, plan.config.train
    if options.teacher is None:
        return Distillation()
    if options.feature_hint and args.n_gpu > 1:
        raise UserError(
            f"--feature_hint works with one GPU in each process, and this one has {args.n_gpu}; start it "
            "with accelerate launch, or leave it out"
        )
    classifier = load_teacher(config, train.id2label, model, preprocessing)
    classifier.model.to(args.device)
    teacher = Teacher(
        classifier, train.id2label, gives_features=options.feature_hint > 0, setting=plan.setting
    )
    fixed = None
    if isinstance(train, Split) and augmentation(config.augment).is_fixed:
        fixed = outputs_of(teacher, train, store, preprocessing, args.dataloader_num_workers)
    logger.info(
        "teacher: %s; its outputs are computed %s",
        options.teacher, "once, because no view is random" if fixed else "in each step",
    )  # fmt: skip
    return Distillation(
        teacher,
        weight=options.distillation_weight,
        temperature=options.distillation_temperature,
        feature_hint=options.feature_hint,
        fixed=fixed,
    )
