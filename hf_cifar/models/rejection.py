"""Thresholds, in a model's config, for answering that an image is of none of its classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_cifar.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The answer is the first of these words that is not a class itself.
ANSWERS = ("unknown", "none of these")
METHOD = "mahalanobis"  # how `models.distance` measures distance


@dataclass(frozen=True)
class Rejection:
    """Thresholds for answering with none of the classes, for a model with one label per image.

    keep: the share of validation images that keep their label. min_confidence: the lowest probability, 0..1,
    with which an image keeps its label. max_distance: the largest distance, see `models.distance`. answer:
    the answer for the other images. head: the name of the module whose input is the feature.
    """

    keep: float
    min_confidence: float
    max_distance: float
    answer: str
    head: str
    method: str = METHOD

    @classmethod
    def fit(
        cls, confidences: np.ndarray, distances: np.ndarray, *, keep: float, answer: str, head: str
    ) -> Rejection:
        """Fit both thresholds to the confidences and distances [N] of validation images.

        Each threshold alone rejects the same number of images: the largest number for which both together
        keep at least the share `keep`.
        """
        count = len(confidences)
        ranks = np.minimum(_ranks(confidences), _ranks(-distances))
        lowest = np.sort(ranks)[int(np.floor(count * (1 - keep) + 1e-9))]
        kept = ranks >= lowest
        return cls(keep, float(confidences[kept].min()), float(distances[kept].max()), answer, head)

    def rejects(self, confidences: np.ndarray, distances: np.ndarray) -> np.ndarray:
        """Return True for each image [N] that gets the answer instead of its label."""
        # NaN is beyond every threshold.
        near = np.less_equal(distances, self.max_distance)
        return np.less(confidences, self.min_confidence) | np.logical_not(near)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for config.json."""
        return dict(sorted(asdict(self).items()))  # as in config.json


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return for each value how many values are lower, [N]."""
    return np.searchsorted(np.sort(values), values)


def answer_for(class_names: Iterable[str]) -> str:
    """Return the answer for images of none of these classes. Raises: UserError if every answer is a class."""
    taken = {name.casefold().strip() for name in class_names}
    for answer in ANSWERS:
        if answer not in taken:
            return answer
    raise UserError(
        f"--reject answers {' or '.join(map(repr, ANSWERS))}, and the data has classes of both names; rename "
        "one, or leave out --reject"
    )


def rejection_of(model: PreTrainedModel) -> Rejection | None:
    """Return the thresholds in a model's config; None for a model that always answers with a class.

    Raises: UserError for damaged ones.
    """
    return rejection_in(model.config.to_dict())


def rejection_in(config: dict[str, Any]) -> Rejection | None:
    """Return the thresholds in the values of a config, see `rejection_of`."""
    found = config.get("reject")
    if not found:
        return None
    try:
        values: dict[str, Any] = {
            each.name: (str if each.type == "str" else float)(found[each.name])
            for each in fields(Rejection)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the model's config.json has a damaged 'reject' ({type(error).__name__}: {error}); remove it, "
            "or run hf-cifar evaluate --reject"
        ) from None
    if values["method"] != METHOD:
        raise UserError(
            f"the model rejects images with the method {values['method']!r}, which this version does not "
            "know; update hf-cifar, or remove 'reject' from its config.json"
        )
    return Rejection(**values)


def forget_rejection(model: PreTrainedModel) -> None:
    """Drop the thresholds of an earlier training from a model's config, because its features will change."""
    if model.config.to_dict().get("reject"):
        model.config.reject = None
