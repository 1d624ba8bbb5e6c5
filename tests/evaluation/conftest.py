"""Random logits and labels for testing every metric."""

from types import SimpleNamespace

import pytest
from scipy.special import softmax


@pytest.fixture(params=("plain", "ties", "missing"))
def drawn(request, draw):
    logits, labels = draw(request.param)
    probabilities = softmax(logits, axis=1)
    return SimpleNamespace(
        logits=logits, labels=labels, probabilities=probabilities,
        predictions=probabilities.argmax(axis=1), num_labels=8,
    )  # fmt: skip
