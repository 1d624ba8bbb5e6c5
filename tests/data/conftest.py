"""Shared by the data tests: an empty `datasets` cache, smooth pictures, small data sets on disk."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keeps what `datasets` prepares inside the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(scope="session")
def photo():
    """A function (height, width, seed) -> Pillow image that is as smooth as most photographs."""

    def paint(height, width, seed=0):
        generator = np.random.default_rng(seed)
        y, x = np.mgrid[0:height, 0:width] / max(height, width)
        channels = []
        for _ in range(3):
            waves = sum(
                np.sin(2 * np.pi * (fy * y + fx * x) + phase)
                for fy, fx, phase in generator.uniform(-2, 2, (4, 3))
            )
            channels.append(128 + 100 * waves / np.abs(waves).max())
        return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))

    return paint


@pytest.fixture(scope="session")
def make_rows():
    """A function (labels, feature, image column, label column) -> Dataset of noise images."""

    def make(labels, feature=None, image="img", label="label", sizes=((8, 8),)):
        generator = np.random.default_rng(len(labels))
        feature = feature or ClassLabel(names=["cat", "dog"])
        pictures = [
            Image.fromarray(generator.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8))
            for i in range(len(labels))
        ]
        features = Features({image: datasets.Image(), label: feature})
        return Dataset.from_dict({image: pictures, label: labels}, features=features)

    return make


@pytest.fixture
def save(tmp_path):
    """A function (**splits) -> folder written by `save_to_disk`."""

    def write(**splits):
        folder = Path(tmp_path, f"saved{len(list(tmp_path.iterdir()))}")
        DatasetDict(splits).save_to_disk(str(folder))
        return folder

    return write
