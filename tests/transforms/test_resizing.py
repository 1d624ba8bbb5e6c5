"""hf_cifar.transforms.resizing: every pixel equals that of the libraries."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

from hf_cifar.transforms.resizing import PILLOW_MAY_START_VERTICALLY, resize_exactly

PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR,
          "box": Image.Resampling.BOX, "lanczos": Image.Resampling.LANCZOS}  # fmt: skip
# Small, large, wide, and so tall that Pillow may start vertically.
SIZES = [(32, 32), (28, 28), (41, 60), (60, 41), (333, 480), (800, 1000)]
TALL = [(480, 333), (64, 43), (100, 90)]


def noise(height, width):
    """Overshoot and ties everywhere."""
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)


def whole(height, width):
    return torch.tensor([[0.0, 0.0, height, width]], dtype=torch.float64)


def by_pillow(images, size, interpolation):
    resized = [
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize(size[::-1], PILLOW[interpolation])
        for image in images
    ]
    return torch.stack([torch.tensor(np.asarray(image)).permute(2, 0, 1) for image in resized])


@pytest.mark.parametrize("interpolation", PILLOW)
@pytest.mark.parametrize("size", [(96, 96), (224, 224), (24, 24), (90, 160)], ids=str)
def test_every_pixel_equals_pillow(interpolation, size):
    for sides in SIZES + TALL:
        images = noise(*sides)
        found = resize_exactly(images, whole(*sides), size, interpolation)
        assert torch.equal(found, by_pillow(images, size, interpolation).float()), sides


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(96, 96), (224, 224), (24, 24), (90, 160)], ids=str)
def test_every_pixel_equals_torchvision(interpolation, size):
    mode = InterpolationMode(interpolation)
    for sides in SIZES + TALL:
        images = noise(*sides)
        expected = torchvision.resize(images, list(size), mode, antialias=True)
        found = resize_exactly(images, whole(*sides), size, interpolation, "torchvision")
        assert torch.equal(found, expected.float()), sides


@pytest.mark.parametrize("library", ["pillow", "torchvision"])
@pytest.mark.parametrize("sides", [(32, 32), (60, 41), (300, 180)], ids=str)
def test_crop_of_the_resized_image_equals_pillow(library, sides):
    """Resize to 73 x 80 pixels and crop to 64 x 48 in one step."""
    images, (height, width) = noise(*sides), sides
    rows, columns = height / 73, width / 80
    box = torch.tensor([[4 * rows, 16 * columns, 68 * rows, 64 * columns]], dtype=torch.float64)
    if library == "pillow":
        resized = by_pillow(images, (73, 80), "bicubic")
    else:
        bicubic = InterpolationMode.BICUBIC
        resized = torchvision.resize(images, [73, 80], bicubic, antialias=True)
    found = resize_exactly(images, box, (64, 48), "bicubic", library)
    assert torch.equal(found, resized[:, :, 4:68, 16:64].float())


@pytest.mark.skipif(
    not PILLOW_MAY_START_VERTICALLY, reason="Pillow before 13 always starts horizontally"
)
def test_tall_images_depend_on_the_order_of_directions(monkeypatch):
    monkeypatch.setattr("hf_cifar.transforms.resizing.PILLOW_MAY_START_VERTICALLY", False)
    found = resize_exactly(noise(480, 333), whole(480, 333), (224, 224))
    assert not torch.equal(found, by_pillow(noise(480, 333), (224, 224), "bicubic").float())
