"""What a classifier gets wrong, from its predictions alone: pairs, images, labels in doubt, slices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def confused_pairs(
    confusion: Sequence[Sequence[int]] | Array, names: Sequence[str], limit: int = 10
) -> list[dict[str, Any]]:
    """The most frequent mistakes: truth, prediction, num_images, and `share`, 0..1, of the truth's images.

    confusion [K, K]: rows are true classes. Ties in the order of the classes; no pair without an image.
    """
    confusion = np.asarray(confusion)
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(cell), len(names)) for cell in order]
    return [
        {
            "truth": names[truth],
            "prediction": names[prediction],
            "num_images": int(wrong[truth, prediction]),
            "share": float(wrong[truth, prediction] / confusion[truth].sum()),
        }
        for truth, prediction in pairs
        if wrong[truth, prediction]
    ]
