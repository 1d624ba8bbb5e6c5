from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from hf_cifar.audit.properties import image_properties


def test_black_and_white_have_extreme_brightness_and_no_contrast():
    images = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
    values = image_properties(images)
    assert values["brightness"] == pytest.approx([0, 1], abs=1e-6)
    assert values["contrast"] == pytest.approx([0, 0], abs=1e-6)
    assert values["sharpness"].tolist() == [0, 0]


def test_brightness_and_contrast_are_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3)).astype(np.uint8)
    values = image_properties(pixels)
    for position, image in enumerate(pixels):
        grey = np.asarray(Image.fromarray(image).convert("L")) / 255
        assert values["brightness"][position] == pytest.approx(grey.mean(), abs=3e-3)
        assert values["contrast"][position] == pytest.approx(grey.std(), abs=3e-3)


def test_blur_lowers_sharpness_for_mixed_sizes():
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    blurred = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2)))
    sharp, soft, _ = image_properties([noise, blurred, noise[:2, :2]])["sharpness"]
    assert soft < sharp / 2


def test_sharpness_does_not_depend_on_contrast():
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    pale = (noise // 4 + 96).astype(np.uint8)
    sharp, also = (image_properties(images)["sharpness"][0] for images in (noise, pale))
    assert also == pytest.approx(sharp, rel=0.02)
