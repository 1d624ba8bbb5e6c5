"""Find suspicious labels, by linear heads on a small model's features that were not fitted to the image."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from hf_cifar.audit.discriminants import out_of_fold_probabilities
from hf_cifar.audit.findings import Example, Finding, count_of
from hf_cifar.audit.labels import UnlikelyPair, suspected_labels, unlikely_pairs
from hf_cifar.audit.survey import SMALL, Survey
from hf_cifar.config.model import SCRATCH, ModelConfig
from hf_cifar.config.run import RunConfig
from hf_cifar.data.labels import SHOWN_CLASSES
from hf_cifar.data.split import Split, prepare_split, subset
from hf_cifar.data.store import build_store
from hf_cifar.data.stratify import representative_rows
from hf_cifar.errors import UserError
from hf_cifar.models.build import build_model
from hf_cifar.models.folding import fold_norms
from hf_cifar.models.heads import linear_head
from hf_cifar.platform import num_cores
from hf_cifar.progress import Progress
from hf_cifar.threads import map_in_threads
from hf_cifar.training.cleaning import FOLDS, checked_folds
from hf_cifar.training.features import has_feature_vectors
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
BUNDLED_MODEL, IMAGE_SIZE = "bundled/efficientnet_lite0", 64
# Features are computed for this long; images that do not fit into this time are left out, at random.
SECONDS, BATCH = 25.0, 64
MARGIN = 3
FEWEST = 500  # images; if there is time for fewer, the pixels of all images are the features
# A pair of classes is a warning if its score, see `unlikely_pairs`, is at least SCORE, and the number of
# labels above the expected one is at least EXCESS and SHARE of the class. On 9,000 images of clean CIFAR-10,
# the highest of 90 scores was 5.3 to 7.0; with 10% of the trucks labelled frog it was 25 to 30, and the
# number was 5% to 6% of the frogs.
SCORE, SHARE, EXCESS = 10.0, 0.02, 5


@dataclass(frozen=True)
class Features:
    """Features [M, D] of some images of train, by their positions [M].

    of, trust: what they are, and how far to trust them, in words.
    """

    values: np.ndarray
    positions: np.ndarray
    of: str
    trust: str


class Candidate(NamedTuple):
    """A model whose features could be used. rate: images per second."""

    name: str
    model: PreTrainedModel
    preprocessing: Preprocessing
    rate: float


def doubted(
    train: Survey, config: RunConfig, built: tuple[PreTrainedModel, BaseImageProcessor] | None
) -> tuple[dict[str, Any], list[Finding]]:
    """Return facts about the labels of train, as plain values, and the findings.

    built: the model of the recipe, if it could be built.
    """
    split = train.good
    if split.labels.ndim == 2:
        return {"checked": 0, "reason": "not checked, because images have multiple labels"}, []
    features = compute_features(train, config, built)
    rows = subset(split, features.positions)
    folds = checked_folds(rows, config.data.split_seed)
    checked = np.flatnonzero(folds >= 0)
    if len(np.unique(rows.labels[checked])) < 2:
        return {
            "checked": 0, "reason": f"not checked, because fewer than two classes have {FOLDS} images"
        }, []  # fmt: skip
    probabilities = out_of_fold_probabilities(
        features.values, rows.labels, folds, len(rows.id2label)
    )[checked]
    labels = rows.labels[checked]
    places = train.readable[features.positions[checked]]
    number, order = suspected_labels(probabilities, labels)
    pairs = unlikely_pairs(probabilities, labels)
    accuracy = float((probabilities.argmax(axis=1) == labels).mean())
    facts: dict[str, Any] = {
        "checked": len(labels), "num_images": len(train.split), "features": features.of,
        "trust": features.trust, "accuracy": accuracy, "num_doubted": number,
        "highest_score": pairs[0].score if pairs else None,
    }  # fmt: skip
    found = list(_pair_findings(pairs, probabilities, labels, places, rows.id2label, facts))
    suggested = probabilities.argmax(axis=1)
    listing = tuple(
        Example(
            ((train.split.name, int(places[row])),),
            f"looks like {rows.id2label[int(suggested[row])]}; probability of its label "
            f"{probabilities[row, labels[row]]:.1%}",
        )
        for row in order[: min(number, SHOWN_CLASSES)]
    )
    text = (
        f"confident learning doubts {number:,} of {count_of(len(labels), 'label')} "
        f"({number / len(labels):.1%}), with linear heads on {features.of}, whose accuracy is "
        f"{accuracy:.1%}; {features.trust}"
    )
    action = "look at the first ones on the page; --clean_labels drop leaves out those that the run finds"
    found.append(Finding("note", "doubted labels", text, action if listing else "", listing))
    return facts, found


def _pair_findings(
    pairs: list[UnlikelyPair],
    probabilities: np.ndarray,
    labels: np.ndarray,
    places: np.ndarray,
    names: dict[int, str],
    facts: dict[str, Any],
) -> Iterator[Finding]:
    for pair in pairs:
        total = int((labels == pair.given).sum())
        excess = len(pair.rows) - pair.expected
        if pair.score < SCORE or excess < max(EXCESS, SHARE * total):
            continue
        given, suggested = names[pair.given], names[pair.suggested]
        yield Finding(
            "warning", "suspicious labels",
            f"{len(pair.rows):,} of {total:,} images labelled {given!r} look like {suggested!r} "
            f"({pair.expected:.0f} expected by chance), by {facts['features']}",
            f"look at them on the page and correct the labels, or pass --clean_labels drop; {facts['trust']}",
            tuple(
                Example((("train", int(places[row])),), f"{given}, looks like {suggested}")
                for row in pair.rows
            ),
        )  # fmt: skip


def compute_features(
    train: Survey, config: RunConfig, built: tuple[PreTrainedModel, BaseImageProcessor] | None
) -> Features:
    """Return features of the pretrained model that covers the most images in `SECONDS`, or else of pixels."""
    split, count = train.good, len(train.good)
    best: Candidate | None = None
    for each in _candidates(split, config, built):
        if best is None or best.rate * SECONDS < min(count, each.rate * SECONDS):
            best = each
    most = 0 if best is None else int(best.rate * SECONDS)
    if best is None or most < min(count, FEWEST):
        pixels = train.colours[train.readable].reshape(count, -1) / np.float32(255)
        return Features(
            pixels, np.arange(count), f"the pixels at {SMALL} x {SMALL}",
            "a weak hint: pixels show only gross mistakes; pip install 'hf-cifar[bundled]' for a pretrained "
            "model",
        )  # fmt: skip
    # The short measurement may underestimate the speed, so more images are prepared, and the clock decides.
    positions = representative_rows(split.labels, MARGIN * most, config.data.split_seed)
    part = prepare_split(
        subset(split, positions), best.preprocessing, kind=config.data.pixel_store, on_bad_image="skip"
    )  # fmt: skip
    store, shown = build_store(part), Progress("computing features of train", len(part))

    def batches() -> Iterator[Tensor]:
        end = time.perf_counter() + SECONDS
        # At random, so that classes are covered equally, however many images there is time for.
        order = np.random.default_rng(config.data.split_seed).permutation(len(part))
        for start in range(0, len(order), BATCH):
            if time.perf_counter() > end and start >= FEWEST:
                return
            done.append(order[start : start + BATCH])
            yield store.__getitems__(done[-1].tolist())["pixel_values"]

    done: list[np.ndarray] = []
    values = []
    for found in features_of_batches(best, batches()):
        values.append(found)
        shown.update(len(found))
    shown.close()
    seen = np.concatenate(done)
    positions = positions[seen]
    side = " x ".join(map(str, best.preprocessing.size))
    return Features(
        np.concatenate(values), positions,
        f"features of {best.name} at {side} px"
        + ("" if len(positions) >= count else f", of {len(positions):,} images chosen at random"),
        "only a hint: mistakes between classes that look alike are not found",
    )  # fmt: skip


def _candidates(
    split: Split, config: RunConfig, built: tuple[PreTrainedModel, BaseImageProcessor] | None
) -> Iterator[Candidate]:
    """Yield the recipe's model if it is pretrained, then the bundled one if it is installed."""
    name = config.model.model_name_or_path
    if built is not None and not name.startswith(SCRATCH):
        yield from _timed(name, *built)
    bundled = ModelConfig(model_name_or_path=BUNDLED_MODEL, image_size=IMAGE_SIZE)
    try:
        yield from _timed(BUNDLED_MODEL, *build_model(bundled, split.id2label))
    except UserError as error:
        logger.info("labels: %s is not used: %s", BUNDLED_MODEL, error)


def _timed(
    name: str, model: PreTrainedModel, image_processor: BaseImageProcessor
) -> Iterator[Candidate]:
    """Yield a model and its speed, if it has one feature vector per image."""
    preprocessing = Preprocessing.from_image_processor(image_processor)
    if not has_feature_vectors(model, preprocessing):
        return
    device = next(model.parameters()).device
    noise = torch.randint(0, 256, (BATCH, 3, *preprocessing.size), dtype=torch.uint8, device=device)
    candidate = Candidate(name, headless(model, preprocessing(noise[:2])), preprocessing, 0.0)
    rounds = num_cores()
    list(features_of_batches(candidate, [noise[:2]]))  # the first one also allocates
    start = time.perf_counter()
    list(features_of_batches(candidate, [noise] * rounds))
    yield candidate._replace(rate=rounds * BATCH / (time.perf_counter() - start))


def headless(model: PreTrainedModel, pixel_values: Tensor) -> PreTrainedModel:
    """Return a copy of a model whose logits are the inputs of its head. pixel_values: an example."""
    model = fold_norms(copy.deepcopy(model), pixel_values)
    head = linear_head(model)
    (name,) = (name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, nn.Identity())
    return model.eval()


def features_of_batches(candidate: Candidate, batches: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Compute the features [B, D] of batches uint8 [B, 3, h, w]; on a CPU each batch on a core of its own."""
    device = next(candidate.model.parameters()).device

    def work(images: Tensor) -> np.ndarray:
        with torch.inference_mode():
            pixel_values = candidate.preprocessing(images.to(device))
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
            return candidate.model(pixel_values=pixel_values).logits.float().cpu().numpy()

    return map_in_threads(work, batches, num_cores() if device.type == "cpu" else 1)
