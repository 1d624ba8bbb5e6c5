"""Drawn logits and labels that every figure is tried on."""

from types import SimpleNamespace

import numpy as np
import pytest

from hf_cifar.evaluation.metrics import softmax


def draw_logits(kind, count=300, num_labels=8):
    """Logits [N, K] and labels [N]: plain, with ties, or with images or predictions missing."""
    generator = np.random.default_rng(len(kind))
    labels = generator.integers(0, num_labels, count)
    logits = generator.normal(size=(count, num_labels)) + 1.5 * np.eye(num_labels)[labels]
    if kind == "ties":
        logits = np.round(logits)
    if kind == "missing":
        labels[labels == 2] = 3  # no image
        logits[:, 5] = -9.0  # no prediction
        labels[labels == 6], logits[:, 6] = 0, -9.0  # neither
    return logits, labels


@pytest.fixture
def draw():
    return draw_logits


@pytest.fixture(params=("plain", "ties", "missing"))
def drawn(request):
    logits, labels = draw_logits(request.param)
    probabilities = softmax(logits)
    return SimpleNamespace(
        logits=logits, labels=labels, probabilities=probabilities,
        predictions=probabilities.argmax(axis=1), num_labels=8,
    )  # fmt: skip
