"""The predictions of a classifier for a set of images, and every metric of them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hf_cifar.config.metrics import metrics_of
from hf_cifar.evaluation.intervals import (
    equal_tailed,
    equal_tailed_by_name,
    nanmean,
    plain_intervals,
    wilson,
)
from hf_cifar.evaluation.metrics import AREA_METRICS, CLASS_METRICS, COUNT_METRICS, Counts, f1

Array = np.ndarray
DRAWS = 1000  # bootstrap samples


class Drawn(NamedTuple):
    """Bootstrap samples of an outcome.

    counts: [draws, K] each. means: of `Outcome.means`, [draws, M]. areas: of each class [draws, K], by name.
    intervals: [2] of the other metrics, by name. Counts may have more draws than means and areas.
    """

    counts: Counts
    means: Array
    areas: dict[str, Array]
    intervals: dict[str, Array]


class Outcome(ABC):
    """The logits [N, K] and labels of N images, and every metric of them, computed on request.

    There are five kinds of metrics, each a dictionary from a metric's name to a function. `shares` return
    bool [N]; the metric is the share of True. `means` return numbers [N]; the metric is their mean.
    `COUNT_METRICS` are functions of the class counts, `AREA_METRICS` of each class's ranking, `others` of the
    outcome itself. `draw` computes the intervals of `others`; those of the first four kinds need no further
    code.
    """

    shares: ClassVar[Mapping[str, Callable[[Any], Array]]]
    means: ClassVar[Mapping[str, Callable[[Any], Array]]]
    others: ClassVar[Mapping[str, Callable[[Any], float]]] = {}
    multi_label: ClassVar[bool]
    calibration_metric: ClassVar[str]

    logits: Array
    labels: Array
    thresholds: Array | None = None  # [K], of multi-label data

    @property
    @abstractmethod
    def probabilities(self) -> Array:
        """Probability of each class [N, K], 0..1."""

    @property
    @abstractmethod
    def predicted(self) -> Array:
        """The prediction for each image, in the form of `labels`."""

    @property
    @abstractmethod
    def correct(self) -> Array:
        """True for each image [N] whose predicted labels are all of its labels and no others."""

    @abstractmethod
    def probabilities_of(self, labels: Array) -> Array:
        """Probability [N], 0..1, of the given labels of each image, in the form of `labels`."""

    @property
    @abstractmethod
    def positive(self) -> Array:
        """True where an image has a class [N, K]."""

    @property
    @abstractmethod
    def counts(self) -> Counts:
        """Images of each class [K]."""

    @abstractmethod
    def calibrate(self) -> dict[str, Any]:
        """Calibrate on these labels: the fields of `Predictions` that change, by name."""

    @abstractmethod
    def draw(self, draws: int, generator: np.random.Generator) -> Drawn:
        """Draw bootstrap samples: counts, means and areas of `draws` resamples of the images."""

    @functools.cached_property
    def areas(self) -> dict[str, Array]:
        """Each area of each class [K], by name; NaN if undefined."""
        return {
            name: area(self.probabilities, self.positive) for name, area in AREA_METRICS.items()
        }

    def metric(self, name: str) -> float | None:
        """One metric by its name in the table; None if undefined."""
        for of_image in (self.shares, self.means):
            if name in of_image:
                return float(of_image[name](self).mean())
        if name in COUNT_METRICS:
            return float(COUNT_METRICS[name](self.counts))
        if name in self.others:
            return self.others[name](self)
        areas = self.areas[name.removesuffix("_macro")]
        return None if np.isnan(areas).all() else float(areas[~np.isnan(areas)].mean())

    def compute(self, id2label: Mapping[int, str]) -> dict[str, Any]:
        """Every metric, as plain JSON values, in the order of the table.

        `per_class` is keyed by class name. None stands for an undefined area.
        """
        names = metrics_of(multi_label=self.multi_label, num_labels=len(id2label))
        return {
            "num_images": len(self.labels),
            **{name: self.metric(name) for name in names},
            "per_class": self._by_class(id2label),
        }

    def _by_class(self, id2label: Mapping[int, str]) -> dict[str, dict[str, float | int | None]]:
        """The number of images and the metrics of each class by name, as plain values."""
        scores = {name: score(self.counts) for name, score in CLASS_METRICS.items()}
        values = self._class_settings() | scores | self.areas
        return {
            name: {
                "num_images": int(self.counts.actual[label]),
                **{
                    key: None if np.isnan(of_class[label]) else float(of_class[label])
                    for key, of_class in values.items()
                },
            }
            for label, name in id2label.items()
        }

    def _class_settings(self) -> dict[str, Array]:
        """Settings of each class [K], by name."""
        return {}

    def intervals(
        self, id2label: Mapping[int, str], draws: int = DRAWS, seed: int = 0
    ) -> dict[str, Any]:
        """95% interval [low, high] of every metric of `compute`, by the same names, as plain values; None for
        an undefined metric."""
        names = metrics_of(multi_label=self.multi_label, num_labels=len(id2label))
        drawn = self.draw(draws, np.random.default_rng(seed))
        count = len(self.labels)
        single = {
            **{n: wilson(self.shares[n](self).sum(), count) for n in names if n in self.shares},
            **equal_tailed_by_name(
                {n: COUNT_METRICS[n](drawn.counts) for n in names if n in COUNT_METRICS}
            ),
            **drawn.intervals,
            **equal_tailed_by_name(
                {
                    **dict(zip(self.means, drawn.means.T, strict=True)),
                    **{f"{name}_macro": nanmean(areas) for name, areas in drawn.areas.items()},
                }
            ),
        }
        per_class = {
            "precision": wilson(self.counts.hits, self.counts.predicted),
            "recall": wilson(self.counts.hits, self.counts.actual),
            "f1": equal_tailed(f1(drawn.counts)),
            **{name: equal_tailed(areas) for name, areas in drawn.areas.items()},
        }
        return plain_intervals(single, per_class, id2label)
