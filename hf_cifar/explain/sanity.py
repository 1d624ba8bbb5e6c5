"""Does a map say anything about the model? Two checks of it that need no labels.

Randomised weights: a map that stays the same with them shows the image, not the model.
Deletion and insertion: if the pixels that a map ranks first are taken away, the probability should fall
faster than in a random order; if they are added first to a blurred image, it should rise faster.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_cifar.explain.methods import Example, logits_of
from hf_cifar.models.blocks import batch_norms
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.text import enumerated

CELLS = 12  # per side: pixels are taken away in square cells, also in random order
STEPS = 18
RANDOM_ORDERS = 5
SIMILAR = 0.5  # a rank correlation from which two maps count as the same
BLUR = 4  # places per side that a blurred image keeps


class Curves(NamedTuple):
    """The probability of the class while cells are deleted or inserted, [STEPS + 1] or means of several."""

    deletion: np.ndarray
    insertion: np.ndarray

    @property
    def areas(self) -> tuple[float, float]:
        """The areas under both curves, 0..1. A good map has a small one and a large one."""
        deletion, insertion = (np.trapezoid(curve, dx=1 / STEPS) for curve in self)
        return float(deletion), float(insertion)


class Check(NamedTuple):
    """What the checks found for a map. correlation: with the map of randomised weights, -1..1; None if one of
    the two is the same everywhere. is_flat: if this one is."""

    curves: Curves
    correlation: float | None
    is_flat: bool


def doubts(check: Check, chance: Curves) -> list[str]:
    """Say what is wrong with the map of one image, if anything."""
    if check.is_flat:
        return ["empty: no pixel supports the class"]
    better = [
        area < random if curve == "deletion" else area > random
        for curve, area, random in zip(
            Curves._fields, check.curves.areas, chance.areas, strict=True
        )
    ]
    failed = [curve for curve, won in zip(Curves._fields, better, strict=True) if not won]
    found = [f"no better than a random order in {enumerated(failed)}"] if failed else []
    if check.correlation is not None and check.correlation >= SIMILAR:
        found.append("similar with randomised weights")
    return found


def randomized(model: PreTrainedModel, pixel_values: Tensor, seed: int = 0) -> PreTrainedModel:
    """Return a copy whose weights are shuffled within each tensor, which removes what it has learned.

    pixel_values [N, 3, H, W]: images from which BatchNorms learn the statistics of the new weights.
    Source: Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018, which draws new weights.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order.to(parameter.device)].view_as(parameter))
    norms = batch_norms(model)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
        norm.train()
    if norms:
        with torch.no_grad():  # two images: of one, a layer with a single place has no variance
            model(pixel_values=torch.cat([pixel_values, pixel_values.flip(3)]))
    return model.eval()


def rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Return Spearman's correlation of two maps, -1..1; None if one of them is the same everywhere."""
    maps = [each.flatten().double().cpu().numpy() for each in (first, second)]
    if any(np.ptp(each) == 0 for each in maps):
        return None
    return float(stats.spearmanr(*maps).statistic)


def curves_of_map(model: PreTrainedModel, example: Example, attribution: Tensor) -> Curves:
    """Delete and insert cells in the order of their mean attribution [H, W]; ties are in random order."""
    cells = _cells(attribution.shape)
    sums = np.bincount(cells.flatten(), attribution.flatten().double().cpu().numpy())
    means = sums / np.bincount(cells.flatten())
    ties = np.random.default_rng(0).random(len(means))
    return _curves(model, example, np.lexsort((ties, -means)))


def curves_of_chance(model: PreTrainedModel, example: Example) -> Curves:
    """The means of five random orders."""
    generator = np.random.default_rng(0)
    count = int(_cells(example.pixel_values.shape[2:]).max()) + 1
    runs = [_curves(model, example, generator.permutation(count)) for _ in range(RANDOM_ORDERS)]
    return Curves(*(np.mean(each, axis=0) for each in zip(*runs, strict=True)))


def _curves(model: PreTrainedModel, example: Example, order: np.ndarray) -> Curves:
    """Delete and insert cells in an order of their numbers, in equal steps.

    Source: Petsiuk et al., RISE, BMVC 2018.
    """
    image, cells = example.pixel_values, _cells(example.pixel_values.shape[2:])
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    changed_by = np.linspace(0, len(order), STEPS + 1).round()[:, None, None]
    changed = torch.as_tensor(rank[cells] < changed_by, device=image.device)[:, None]
    blurred = nn.functional.adaptive_avg_pool2d(image, BLUR)
    blurred = nn.functional.interpolate(blurred, image.shape[2:], mode="bilinear")
    deleted = torch.where(changed, torch.zeros_like(image), image)
    inserted = torch.where(changed, image, blurred)
    with torch.inference_mode():
        logits = logits_of(model)(torch.cat([deleted, inserted])).float()
        probabilities = logits.sigmoid() if is_multi_label(model) else logits.softmax(dim=1)
    return Curves(*probabilities[:, example.class_id].double().cpu().numpy().reshape(2, -1))


def _cells(size: tuple[int, ...] | torch.Size) -> np.ndarray:
    """Number the cells of an image from 0: [H, W]."""
    rows, columns = (np.arange(side) * min(CELLS, side) // side for side in size)
    return rows[:, None] * (columns.max() + 1) + columns


def summarize(checks: Sequence[Check], chances: Sequence[Curves]) -> dict[str, Any]:
    """Summarise the checks of a method over images: means of the areas, the gains over a random order with
    95% intervals (None for one image), the median correlation, and a verdict in words."""
    facts: dict[str, Any] = {"num_images": len(checks)}
    failed = []
    for number, curve in enumerate(Curves._fields):
        areas = np.array([check.curves.areas[number] for check in checks])
        random = np.array([chance.areas[number] for chance in chances])
        gains = random - areas if curve == "deletion" else areas - random
        interval = _interval(gains)
        facts[curve] = {
            "area": float(areas.mean()),
            "random_area": float(random.mean()),
            "gain": float(gains.mean()),
            "interval": interval,
            "num_better": int((gains > 0).sum()),
            "curve": np.mean([check.curves[number] for check in checks], axis=0).tolist(),
            "random_curve": np.mean([chance[number] for chance in chances], axis=0).tolist(),
        }
        if (gains.mean() if interval is None else interval[0]) <= 0:
            failed.append(curve)
    found = [check.correlation for check in checks if check.correlation is not None]
    facts["correlation"] = float(np.median(found)) if found else None
    facts["num_flat"] = sum(check.is_flat for check in checks)
    beaten = (
        f"is not shown to beat a random order in {enumerated(failed)}"
        if failed
        else "beats a random order in deletion and insertion"
    )
    if facts["correlation"] is None:
        changed = "is constant, with the model's weights or with randomised ones"
    elif facts["correlation"] < SIMILAR:
        changed = "changes with randomised weights"
    else:
        changed = (
            "hardly changes with randomised weights, so it shows the image more than the model"
        )
    facts["passed"] = not failed and (facts["correlation"] or 0) < SIMILAR
    facts["verdict"] = f"{beaten}; {changed}"
    return facts


def _interval(gains: np.ndarray) -> list[float] | None:
    """Return the 95% interval of the mean of gains [N], by Student's t; None for fewer than two."""
    if len(gains) < 2:
        return None
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    return [float(gains.mean() - half), float(gains.mean() + half)]
