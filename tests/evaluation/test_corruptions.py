from __future__ import annotations

import io
import math

import numpy as np
import pytest
import skimage.color
import torch
from PIL import Image
from scipy import ndimage

from hf_cifar.data.store import ResidentStore
from hf_cifar.evaluation.blur import enlarge, gaussian_filter, scale_of, smear
from hf_cifar.evaluation.corruptions import CORRUPTIONS, SEVERITIES, CorruptedStore, corrupt
from hf_cifar.evaluation.noise import uniform
from hf_cifar.evaluation.weather import frost_texture, plasma

# As published, a higher severity moves points less but stretches more, or blurs more but exchanges less.
NOT_MONOTONE = ("elastic_transform", "glass_blur", "frost")


@pytest.fixture
def images():
    """Smooth random images, uint8 [8, 3, 32, 32]."""
    return smooth(32)


def smooth(side, width=None):
    """Return smooth random images, uint8 [8, 3, side, width]."""
    generator = np.random.default_rng(0)
    size = (width or side, side)
    small = [generator.integers(40, 200, (6, 6, 3)).astype(np.uint8) for _ in range(8)]
    large = [Image.fromarray(s).resize(size, Image.Resampling.BICUBIC) for s in small]
    return torch.from_numpy(np.stack([np.asarray(image) for image in large])).permute(0, 3, 1, 2)


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def distance(corrupted, images):
    return (corrupted.float() - images.float()).abs().mean().item()


def test_the_corruptions_are_those_of_cifar_10_c():
    assert list(CORRUPTIONS) == [
        "gaussian_noise", "shot_noise", "impulse_noise",
        "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
        "snow", "frost", "fog", "brightness",
        "contrast", "elastic_transform", "pixelate", "jpeg_compression",
    ]  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_higher_severity_changes_the_image_more(images, name):
    distances = []
    for severity in SEVERITIES:
        corrupted = corrupt(images, name, severity, range(8))
        assert corrupted.shape == images.shape and corrupted.dtype == torch.uint8
        distances.append(distance(corrupted, images))
    assert distances[0] > 0
    if name not in NOT_MONOTONE:
        assert distances == sorted(distances)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_the_same_way_in_every_batch(images, name):
    together = corrupt(images, name, 3, range(8))
    assert torch.equal(together, corrupt(images, name, 3, range(8)))
    # Sums of a batch of another size may differ in the last bit, and so rarely in the rounding.
    apart = corrupt(images[5:7], name, 3, [5, 6])
    assert (together[5:7].int() - apart.int()).abs().max() <= 1


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (20, 47), (70, 33), (1, 1)])
def test_images_of_any_size_keep_it(name, height, width):
    large = smooth(height, width)[:2]
    for severity in (1, 5):
        assert corrupt(large, name, severity, range(2)).shape == large.shape


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_black_and_white_images_have_no_invalid_values(name):
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 32, 32)
    changed = CORRUPTIONS[name](extremes.float() / 255, 5, generators(2))
    assert changed.isfinite().all()


@pytest.mark.parametrize(
    "name", ["defocus_blur", "motion_blur", "zoom_blur", "fog", "elastic_transform"]
)
def test_lengths_grow_with_the_image(name):
    small, large = (distance(corrupt(x, name, 5, range(8)), x) for x in (smooth(32), smooth(128)))
    assert large == pytest.approx(small, rel=0.3)


def test_gaussian_noise_has_its_strength():
    grey = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8)
    noisy = corrupt(grey, "gaussian_noise", 5, range(64)).float()
    assert noisy.std().item() / 255 == pytest.approx(0.10, rel=0.02)


def test_shot_noise_has_the_variance_of_its_photons():
    grey = torch.full((64, 3, 32, 32), 102, dtype=torch.uint8)
    noisy = corrupt(grey, "shot_noise", 5, range(64)).float() / 255
    assert noisy.mean().item() == pytest.approx(0.4, rel=0.01)
    assert noisy.var().item() == pytest.approx(0.4 / 50, rel=0.02)


def test_impulse_noise_sets_its_share_to_black_and_white():
    grey = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8)
    noisy = corrupt(grey, "impulse_noise", 5, range(64))
    for value in (0, 255):
        assert (noisy == value).float().mean().item() == pytest.approx(0.035, rel=0.05)
    assert sorted(noisy.unique().tolist()) == [0, 128, 255]


def test_gaussian_filter_is_that_of_scipy(images):
    blurred = gaussian_filter(images.float(), 1.3).numpy()
    reference = ndimage.gaussian_filter(
        images.numpy().astype(np.float32), (0, 0, 1.3, 1.3), mode="nearest"
    )
    np.testing.assert_allclose(blurred, reference, atol=1e-3)


def test_defocus_is_a_disk_smoothed_by_a_small_gaussian(images):
    disk = np.zeros((9, 9), np.float32)
    disk[3:6, 3:6] = 1 / 9
    weights = np.exp(-0.5 * (np.arange(-1, 2) / 0.1) ** 2)
    kernel = ndimage.convolve(disk, np.outer(weights, weights) / weights.sum() ** 2)
    for image, ours in zip(
        images.numpy(), corrupt(images, "defocus_blur", 5, range(8)), strict=True
    ):
        for channel, blurred in zip(image, ours.numpy(), strict=True):
            reference = ndimage.convolve(channel.astype(np.float32), kernel, mode="nearest")
            assert np.abs(reference - blurred).max() <= 0.51


def test_glass_takes_every_pixel_from_above_and_left(images):
    ours = CORRUPTIONS["glass_blur"](images.float(), 1, generators(8))
    near = torch.stack(
        [images[:, :, 1 - d : 32 - d, 1 - r : 32 - r] for d in (0, 1) for r in (0, 1)]
    )
    chosen = (near == ours[None, :, :, 1:, 1:]).all(dim=2)
    assert chosen.any(dim=0).all()
    assert chosen.float().mean(dim=(1, 2, 3)).tolist() == pytest.approx([0.25] * 4, abs=0.05)


@pytest.mark.parametrize("degrees", [0.0, 20.0, -45.0, -90.0])
def test_motion_blur_is_a_one_sided_gaussian_along_a_line(images, degrees):
    picture = images.float()
    ours = smear(picture, 4, 1.5, torch.full((8,), degrees)).numpy()
    weights = np.exp(-0.5 * (np.arange(7) / 1.5) ** 2)
    reference = np.zeros_like(ours)
    for step, weight in enumerate(weights / weights.sum()):
        down = round(step * math.sin(math.radians(degrees)))
        right = round(step * math.cos(math.radians(degrees)))
        reference += weight * ndimage.shift(
            picture.numpy(), (0, 0, -down, -right), order=0, mode="nearest"
        )
    np.testing.assert_allclose(ours, reference, atol=1e-3)


def test_enlarging_is_about_the_centre(images):
    ours = enlarge(images.float(), 1.25).numpy()
    reference = ndimage.affine_transform(
        images.numpy().astype(np.float64), (1, 1, 0.8, 0.8), offset=(0, 0, 3.1, 3.1), order=1
    )
    np.testing.assert_allclose(ours, reference, atol=0.01)


def test_zoom_blur_is_the_mean_of_enlarged_images(images):
    ours = corrupt(images, "zoom_blur", 1, range(8)).float()
    parts = [images.float(), *(enlarge(images.float(), 1 + i / 100) for i in range(7))]
    assert (ours - torch.stack(parts).mean(dim=0)).abs().max() <= 0.51


def test_snow_whitens_and_falls_downwards():
    grey = torch.full((64, 3, 32, 32), 60, dtype=torch.uint8)
    snowy = corrupt(grey, "snow", 5, range(64)).float()
    # Without flakes: 0.8 of the image and 0.2 of 1.5 times its grey value + 0.5.
    assert snowy.min().item() == pytest.approx(0.8 * 60 + 0.2 * (1.5 * 60 + 127.5), abs=1)
    along, across = ((snowy.diff(dim=dim)).abs().mean().item() for dim in (2, 3))
    assert along < 0.7 * across
    assert snowy.std(dim=1).max() == 0


def test_frost_is_a_texture_within_range_and_keeps_its_share_of_the_image():
    texture = frost_texture((32, 32), generators(64))
    assert texture.min() >= 0 and texture.max() <= 1
    assert 0.6 < texture.mean() < 0.8 and texture.std(dim=(2, 3)).mean() > 0.08
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    blue = corrupt(images, "frost", 5, range(64))[:, 2:].float() / 255
    assert (blue - 0.45 * texture).abs().max() < 0.003
    large = frost_texture((128, 128), generators(64))
    small = torch.nn.functional.avg_pool2d(large, 4)
    assert torch.corrcoef(torch.stack([small.flatten(), texture.flatten()]))[0, 1] > 0.8


def test_fog_follows_its_formula_and_keeps_the_brightest_value():
    images = torch.full((8, 3, 32, 32), 204, dtype=torch.uint8)
    foggy = corrupt(images, "fog", 4, range(8)).float() / 255
    cloud = plasma(32, 2.0, generators(8))[:, None]
    assert (foggy - (0.8 + cloud) * 0.8 / 1.8).abs().max() < 0.003
    assert foggy.amax(dim=(1, 2, 3)).tolist() == pytest.approx([0.8] * 8, abs=0.003)


def test_plasma_is_diamond_square():
    """The centre of the first square, and then the middle of an edge, by hand."""
    noise = uniform(-1, 1, generators(1), (4, 4))[0]
    value = {(0, 0): 0.0}
    for step, amplitude in ((4, 1.0), (2, 0.25)):
        half = step // 2
        for pattern in ("centre", "edge"):
            new = {}
            for row in range(0, 4, half):
                for column in range(0, 4, half):
                    odd = (row // half) % 2, (column // half) % 2
                    if odd != (1, 1) and (pattern == "centre" or odd == (0, 0)):
                        continue
                    if odd == (1, 1) and pattern == "edge":
                        continue
                    steps = [(half, half), (half, -half), (-half, half), (-half, -half)]
                    if pattern == "edge":
                        steps = [(half, 0), (-half, 0), (0, half), (0, -half)]
                    around = [value[(row + d) % 4, (column + r) % 4] for d, r in steps]
                    new[row, column] = sum(around) / 4 + amplitude * noise[row, column].item()
            value |= new
    expected = torch.tensor([[value[row, column] for column in range(4)] for row in range(4)])
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert torch.allclose(plasma(4, 2.0, generators(1))[0], expected, atol=1e-5)


def test_brightness_is_that_of_skimages_hsv(images):
    ours = corrupt(images, "brightness", 5, range(8))
    for image, brighter in zip(images, ours, strict=True):
        hsv = skimage.color.rgb2hsv(image.permute(1, 2, 0).numpy())
        hsv[:, :, 2] = np.clip(hsv[:, :, 2] + 0.3, 0, 1)
        reference = skimage.color.hsv2rgb(hsv) * 255
        assert np.abs(reference - brighter.permute(1, 2, 0).numpy()).max() <= 0.51


def test_brightness_changes_black():
    black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert corrupt(black, "brightness", 4, [0]).unique().tolist() == [51]


def test_contrast_keeps_the_mean_of_each_channel(images):
    pale = corrupt(images, "contrast", 5, range(8)).float()
    mean = images.float().mean(dim=(2, 3), keepdim=True)
    assert (pale - (mean + 0.15 * (images - mean))).abs().max() <= 0.51


def test_elastic_deformation_moves_the_image_as_scipy_does(images):
    ours = CORRUPTIONS["elastic_transform"](images.float(), 5, generators(8)).numpy()
    for number, image in enumerate(images.numpy().astype(np.float64)):
        generator = torch.Generator().manual_seed(number)
        # Three points at 2/3 of the way from the centre to the edges, in pixels: x, y.
        centre, third = 15.5, 32 / 3
        fixed = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])
        moved = fixed + 32 * 0.03 * (2 * torch.rand((3, 2), generator=generator).numpy() - 1)
        affine = np.linalg.solve(np.c_[moved, np.ones(3)], fixed)
        noise = 2 * torch.rand((2, 32, 32), generator=generator).numpy() - 1
        right, down = (
            ndimage.gaussian_filter(each, 0.96, radius=3, mode="nearest") * 3.2 for each in noise
        )
        rows, columns = np.mgrid[:32, :32]
        points = np.stack([columns + right, rows + down, np.ones((32, 32))], axis=-1) @ affine
        for channel, deformed in zip(image, ours[number], strict=True):
            reference = ndimage.map_coordinates(
                channel, (points[..., 1], points[..., 0]), order=1, mode="reflect"
            )
            np.testing.assert_allclose(deformed, reference, atol=0.05)


def test_pixelate_is_pillows_box_filter(images):
    ours = corrupt(images, "pixelate", 5, range(8))
    for image, large in zip(images, ours, strict=True):
        small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (20, 20), Image.Resampling.BOX
        )
        expected = np.array(small.resize((32, 32), Image.Resampling.BOX))
        assert np.array_equal(large.permute(1, 2, 0).numpy(), expected)


def test_jpeg_has_its_quality(images):
    ours = corrupt(images, "jpeg_compression", 5, range(8))
    for image, decoded in zip(images, ours, strict=True):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=40)
        expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
        assert torch.equal(decoded, expected)


def test_lengths_are_relative_to_the_shorter_side():
    assert scale_of(torch.zeros(1, 3, 224, 300)) == 7


def test_corrupted_store_does_not_depend_on_batching(images):
    store = ResidentStore(images.permute(0, 2, 3, 1).contiguous(), torch.arange(8))
    corrupted = CorruptedStore(store, "gaussian_noise", 3)
    assert len(corrupted) == 8
    batch = corrupted.__getitems__([5, 2])
    assert batch["labels"].tolist() == [5, 2]
    assert torch.equal(corrupted[2]["pixel_values"], batch["pixel_values"][1:])
    assert not torch.equal(batch["pixel_values"][1], images[2])
