"""Shared by the tests: no network, few threads, tiny real models and data."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def own_disk_cache(tmp_path_factory):
    """What is kept for the next run lies inside the tests' own folder."""
    os.environ["HF_CIFAR_CACHE"] = str(tmp_path_factory.mktemp("disk_cache"))


@pytest.fixture(scope="session")
def stripes(tmp_path_factory):
    """An image folder that can be learned in seconds: 16 x 16 px, horizontal or vertical stripes."""
    root = tmp_path_factory.mktemp("stripes")
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 11)):
        for name in ("across", "down"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 60, (16, 16, 3))
                phase = generator.integers(0, 4)
                lines = (np.arange(16) + phase) // 2 % 2 == 0
                pixels[lines] += 180
                if name == "down":
                    pixels = pixels.transpose(1, 0, 2)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """An image folder of 16 x 16 px in all colours, of two classes."""
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for i in range(48):
        folder = root / ("one", "two")[i % 2]
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory):
    """A ViT of two layers for 16 x 16 px images, saved as transformers saves it, with three classes."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny_vit")
    config = ViTConfig(
        image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
