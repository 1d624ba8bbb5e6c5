import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hf_cifar.transforms.resampling import (
    KERNELS,
    Levels,
    Taps,
    affine_sample,
    resample,
    rotation,
    shear,
    whole_image,
)

PILLOW = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}


def batch(*images):
    return torch.stack([torch.tensor(np.asarray(image)) for image in images]).permute(0, 3, 1, 2)


def noise(num_images, height=12, width=16):
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, 3, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("interpolation", KERNELS)
@pytest.mark.parametrize(("in_size", "out_size"), [(32, 96), (32, 32), (100, 33), (7, 64)])
def test_matrix_rows_are_weights_that_sum_to_one(interpolation, in_size, out_size):
    start = torch.tensor([0.0, -3.0, 2.5])
    stop = torch.tensor([float(in_size), in_size - 3.0, in_size - 2.5])
    weights = Taps.of(start, stop, in_size, out_size, interpolation).matrix
    assert weights.shape == (3, out_size, in_size)
    assert torch.allclose(weights.sum(-1), torch.ones(3, out_size), atol=1e-5)


@pytest.mark.parametrize("num_boxes", [1, 3])
def test_sum_over_taps_equals_the_matrix_product(num_boxes):
    """A CPU computes the first, a GPU the second."""
    start = torch.tensor([0.0, 9.5, -3.0])[:num_boxes]
    taps = Taps.of(start, torch.tensor([12.0, 2.5, 25.0])[:num_boxes], 12, 7)
    lines = noise(3).float()
    assert torch.allclose(taps(lines), taps.matrix[:, None] @ lines, atol=1e-3)


@pytest.mark.parametrize("interpolation", KERNELS)
@pytest.mark.parametrize("size", [(96, 96), (224, 150), (19, 13), (41, 60)])
def test_resample_equals_pillow(photo, interpolation, size):
    image = photo(41, 60)
    expected = image.resize(size[::-1], PILLOW[interpolation])
    found = resample(batch(image), whole_image(41, 60), size, interpolation)
    assert found.shape == (1, 3, *size)
    assert (found - batch(expected)).abs().max() <= 1.5


@pytest.mark.parametrize("interpolation", KERNELS)
def test_resample_of_noise_equals_pillow(interpolation):
    """A hard case, with overshoot everywhere. Pillow rounds between its two passes."""
    images = noise(1, 32, 32)
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    for size in ((80, 96), (20, 13)):
        expected = batch(picture.resize(size[::-1], PILLOW[interpolation]))
        found = resample(images, whole_image(32, 32), size, interpolation)
        assert (found - expected).abs().max() <= 2.0


def test_resample_of_a_box_equals_pillow(photo):
    image = photo(40, 50)
    boxes = torch.tensor([[4.5, 6.0, 30.25, 44.0], [0.0, 0.0, 20.0, 20.0]])
    found = resample(batch(image, image), boxes, (64, 48))
    for view, (top, left, bottom, right) in zip(found, boxes.tolist(), strict=True):
        expected = image.resize((48, 64), PILLOW["bicubic"], box=(left, top, right, bottom))
        # Pillow ignores pixels outside the box, resample uses them.
        inner = (slice(None), slice(8, -8), slice(8, -8))
        assert (view - batch(expected)[0])[inner].abs().max() <= 1.5


def test_identity_changes_nothing():
    images = noise(4)
    for interpolation in KERNELS:
        found = resample(images, whole_image(12, 16), (12, 16), interpolation)
        assert torch.allclose(found, images.float(), atol=1e-3)


@pytest.mark.parametrize("interpolation", KERNELS)
def test_flip_equals_torch_flip(photo, interpolation):
    images = batch(photo(24, 32), photo(24, 32, 1))
    flipped = torch.tensor([[0.0, 32.0, 24.0, 0.0]])
    found = resample(images, flipped, (50, 40), interpolation)
    plain = resample(images, whole_image(24, 32), (50, 40), interpolation)
    assert torch.allclose(found, plain.flip(-1), atol=1e-2)


def test_whole_pixel_shifts_equal_a_loop_with_mirroring():
    images = noise(5)
    shifts = [(0, 0), (3, -4), (-2, 5), (-4, -1), (4, 4)]
    boxes = torch.tensor([[dy, dx, dy + 12, dx + 16] for dy, dx in shifts], dtype=torch.float32)
    found = resample(images, boxes, (12, 16))

    def mirrored(i, length):
        return -i - 1 if i < 0 else 2 * length - 1 - i if i >= length else i

    for n, (dy, dx) in enumerate(shifts):
        for y in range(12):
            for x in range(16):
                pixel = images[n, :, mirrored(y + dy, 12), mirrored(x + dx, 16)]
                assert torch.allclose(found[n, :, y, x], pixel.float(), atol=1e-2)


def test_boxes_of_a_batch_are_independent(photo):
    images = batch(*(photo(20, 20, seed) for seed in range(6)))
    boxes = torch.rand(6, 4, generator=torch.Generator().manual_seed(3)) * 24 - 2
    together = resample(images, boxes, (30, 30))
    for n in range(6):
        alone = resample(images[n : n + 1], boxes[n : n + 1], (30, 30))
        assert torch.allclose(together[n], alone[0], atol=1e-2)


def test_values_stay_in_range():
    edges = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    edges[..., ::4] = 255
    boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0], [-3.0, 19.0, 13.0, 3.0]])
    for found in (
        resample(edges, boxes, (57, 57)),
        affine_sample(edges, boxes, rotation(torch.tensor([0.3, -1.0])), (57, 57)),
    ):
        assert found.min() >= 0
        assert found.max() <= 255


@pytest.mark.parametrize("size", [(32, 32), (80, 80), (16, 16)])
def test_affine_sample_without_an_angle_equals_resample(photo, size):
    images = batch(photo(32, 32), photo(32, 32, 1))
    whole = whole_image(32, 32).expand(2, 4)
    found = affine_sample(images, whole, rotation(torch.zeros(2)), size)
    assert found.shape == (2, 3, *size)
    # torch's cubic kernel is a little sharper than Pillow's.
    assert (found - resample(images, whole, size)).abs().max() <= 4


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_quarter_turns_are_counter_clockwise(quarters):
    images = noise(2, 16, 16)
    angles = torch.full((2,), quarters * math.pi / 2)
    found = affine_sample(images, whole_image(16, 16).expand(2, 4), rotation(angles), (16, 16))
    assert (found - torch.rot90(images, quarters, dims=(2, 3))).abs().max() <= 0.1


def test_small_rotation_agrees_with_pillow(photo):
    image = photo(64, 64)
    angles = torch.tensor([math.radians(10)])
    found = affine_sample(batch(image), whole_image(64, 64), rotation(angles), (64, 64))
    expected = batch(image.rotate(10, Image.Resampling.BICUBIC))
    inner = (..., slice(14, -14), slice(14, -14))
    assert (found - expected)[inner].abs().max() <= 2


def test_rotation_outside_the_image_is_mirrored():
    images = torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)
    found = affine_sample(images, whole_image(16, 16), rotation(torch.tensor([0.7])), (16, 16))
    assert torch.allclose(found, torch.full_like(found, 200), atol=1e-2)


def test_normalization_equals_torchvision():
    from torchvision.transforms.v2 import functional

    images = noise(3)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    expected = functional.normalize(images / 255, mean.tolist(), std.tolist())
    assert torch.allclose(Levels.normalizing(mean, std)(images), expected, atol=1e-5)


def test_shear_moves_rows_and_columns():
    images = noise(1, 32, 32)
    linear = shear(torch.tensor([0.0]), torch.tensor([0.5]))
    found = affine_sample(images, whole_image(32, 32), linear, (32, 32))
    exact = F.grid_sample(
        images.float(),
        F.affine_grid(torch.tensor([[[1.0, -0.5, 0], [0, 1, 0]]]), (1, 3, 32, 32), False),
        mode="bicubic", padding_mode="reflection", align_corners=False,
    ).clamp(0, 255)  # fmt: skip
    assert torch.allclose(found, exact, atol=1e-2)
    turned = affine_sample(
        images.mT, whole_image(32, 32), shear(*torch.tensor([[0.5], [0.0]])), (32, 32)
    )
    assert torch.allclose(turned.mT, found, atol=1e-2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_levels_and_memory_format_equal_separate_passes(memory_format):
    images = torch.randint(0, 256, (4, 3, 20, 24), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, 20, 24], [2, 20, 15, 3], [-3, -2, 18, 20], [5, 5, 9, 9]])
    levels = Levels.normalizing(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.25, 0.5]))
    for chosen, size in ((boxes, (30, 40)), (boxes[:1], (11, 7))):
        found = resample(images, chosen, size, "bicubic", levels, memory_format)
        assert torch.allclose(found, levels(resample(images, chosen, size)), atol=1e-5)
        assert found.is_contiguous(memory_format=memory_format)
