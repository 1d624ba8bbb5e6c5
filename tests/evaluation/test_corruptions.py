from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from hf_cifar.data.store import ResidentStore
from hf_cifar.evaluation.corruptions import CORRUPTIONS, SEVERITIES, CorruptedStore


@pytest.fixture
def images():
    """Smooth random images, uint8 [8, 3, 32, 32]."""
    generator = np.random.default_rng(0)
    small = [generator.integers(40, 200, (6, 6, 3)).astype(np.uint8) for _ in range(8)]
    large = [Image.fromarray(s).resize((32, 32), Image.Resampling.BICUBIC) for s in small]
    return torch.from_numpy(np.stack([np.asarray(image) for image in large])).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_higher_severity_changes_the_image_more(images, name):
    distances = []
    for severity in SEVERITIES:
        corrupted = CORRUPTIONS[name](images, severity, range(8))
        assert corrupted.shape == images.shape and corrupted.dtype == torch.uint8
        distances.append((corrupted.float() - images.float()).abs().mean().item())
    assert distances[0] > 0 and distances == sorted(distances)


def test_noise_has_its_strength_and_depends_on_the_image_seed(images):
    grey = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8)
    noisy = CORRUPTIONS["gaussian_noise"](grey, 5, range(64)).float()
    assert noisy.std().item() / 255 == pytest.approx(0.10, rel=0.02)
    assert torch.equal(
        CORRUPTIONS["gaussian_noise"](images[3:5], 2, [3, 4]),
        CORRUPTIONS["gaussian_noise"](images, 2, range(8))[3:5],
    )


def test_jpeg_has_its_quality(images):
    ours = CORRUPTIONS["jpeg"](images, 5, range(8))
    for image, decoded in zip(images, ours, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=40)
        expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert torch.equal(decoded, expected)


def test_blur_is_a_gaussian(images):
    blurred = CORRUPTIONS["gaussian_blur"](images, 5, range(8))[:, :, 8:-8, 8:-8].float()
    for image, ours in zip(images, blurred, strict=True):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        pillows = np.asarray(picture.filter(ImageFilter.GaussianBlur(1.0)))[8:-8, 8:-8]
        assert (ours.permute(1, 2, 0) - torch.from_numpy(pillows.copy()).float()).abs().max() < 6


def test_brightness_changes_black_and_keeps_the_hue(images):
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert CORRUPTIONS["brightness"](black, 5, [0]).unique().tolist() == [76]
    colour = torch.tensor([100, 50, 0], dtype=torch.uint8).view(1, 3, 1, 1)
    assert CORRUPTIONS["brightness"](colour, 4, [0]).flatten().tolist() == [151, 76, 0]


def test_low_contrast_keeps_the_mean_of_each_channel(images):
    pale = CORRUPTIONS["low_contrast"](images, 5, range(8)).float()
    assert torch.allclose(pale.mean(dim=(2, 3)), images.float().mean(dim=(2, 3)), atol=0.6)
    assert pale.std() < images.float().std()


def test_corrupted_store_does_not_depend_on_batching(images):
    store = ResidentStore(images.permute(0, 2, 3, 1).contiguous(), torch.arange(8))
    corrupted = CorruptedStore(store, "gaussian_noise", 3)
    assert len(corrupted) == 8
    batch = corrupted.__getitems__([5, 2])
    assert batch["labels"].tolist() == [5, 2]
    assert torch.equal(corrupted[2]["pixel_values"], batch["pixel_values"][1:])
    assert not torch.equal(batch["pixel_values"][1], images[2])
