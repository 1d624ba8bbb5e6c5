import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from hf_cifar.transforms import color
from hf_cifar.transforms.augmentation import Augmentation, combine_views, sample_views
from hf_cifar.transforms.mixing import erase, mix
from hf_cifar.transforms.policies import (
    COLOR_OPS,
    GEOMETRIC_OPS,
    OPS,
    RAND_AUGMENT,
    TRIVIAL_AUGMENT,
    Policy,
    color_jitter,
)
from hf_cifar.transforms.preprocessing import Preprocessing
from hf_cifar.transforms.resampling import resample, rotation, shear, whole_image
from hf_cifar.transforms.views import Affine, RandomView

ALL_VIEWS = {
    "shift": RandomView(padding=0.125),
    "crop": RandomView(min_area=0.2),
    "flip": RandomView(flip=0.5),
    "zoom": RandomView(zoom=0.3),
    "rotation": RandomView(rotation=20),
    "shear": RandomView(shear=0.2),
    "everything": RandomView(0.125, 0.5, 4 / 3, 0.5, 15, 0.1, 0.2),
}
CROP_FLIP = RandomView(min_area=0.6, flip=0.5)  # no two crops are equal
ALL_AUGMENTATIONS = {
    "trivial_augment": Augmentation(CROP_FLIP, Policy.trivial_augment()),
    "rand_augment": Augmentation(CROP_FLIP, Policy.rand_augment()),
    "color_jitter": Augmentation(color_jitter=0.4),
    "hue": Augmentation(hue=0.2),
    "grayscale": Augmentation(CROP_FLIP, grayscale=0.5),
    "erasing": Augmentation(CROP_FLIP, random_erasing=0.5),
    "mixup": Augmentation(CROP_FLIP, mixup_alpha=0.8),
    "cutmix": Augmentation(CROP_FLIP, cutmix_alpha=1.0),
    "everything": Augmentation(
        ALL_VIEWS["everything"], Policy.rand_augment(), 0.4, 0.1, 0.2, 0.25, 0.8, 1.0
    ),
}  # fmt: skip
PREPROCESSING = Preprocessing((48, 48), None, "bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def noise(num_images, height=12, width=16):
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, 3, height, width)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def batch(*images):
    return torch.stack([torch.tensor(np.asarray(image)) for image in images]).permute(0, 3, 1, 2)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def show(view, images, size, seed=0):
    boxes, linear = view.draw(len(images), *images.shape[-2:], size, seeded(seed))
    return sample_views(images, boxes, linear, size, "bicubic")


def augment(augmentation, images, seed=0):
    labels = torch.arange(len(images)) % 10
    return augmentation(images, labels, PREPROCESSING, 10, seeded(seed))


@pytest.mark.parametrize("view", [v for k, v in ALL_VIEWS.items() if k not in ("flip", "shift")])
def test_every_image_of_a_batch_has_its_own_view(view):
    images = noise(1, 32, 32).expand(64, -1, -1, -1)
    found = show(view, images, (32, 32))
    assert len({image.numpy().tobytes() for image in found}) == 64


def test_flip_is_drawn_per_image():
    images = noise(1, 32, 32).expand(64, -1, -1, -1)
    found = show(RandomView(flip=0.5), images, (32, 32))
    flipped = [torch.allclose(image, images[0].flip(-1).float(), atol=1e-2) for image in found]
    plain = [torch.allclose(image, images[0].float(), atol=1e-2) for image in found]
    assert sum(flipped) + sum(plain) == 64
    assert 16 < sum(flipped) < 48


@pytest.mark.parametrize("view", ALL_VIEWS.values(), ids=ALL_VIEWS)
def test_generator_determines_every_bit(view):
    images = noise(16, 32, 32)
    first = show(view, images, (48, 48), 7)
    torch.rand(3)  # the global generator must not matter
    assert torch.equal(first, show(view, images, (48, 48), 7))
    assert not torch.equal(first, show(view, images, (48, 48), 8))


def test_drawing_does_not_use_the_global_generator():
    state = torch.get_rng_state()
    show(ALL_VIEWS["everything"], noise(4), (12, 16))
    assert torch.equal(torch.get_rng_state(), state)


def test_default_view_is_plain_resampling():
    images = noise(4)
    found = show(RandomView(), images, (30, 30))
    assert torch.allclose(found, resample(images, whole_image(12, 16), (30, 30)), atol=1e-2)


def test_random_crops_are_within_their_limits():
    view = RandomView(min_area=0.3, max_ratio=2.0)
    boxes, linear = view.draw(2000, 32, 32, (32, 32), seeded(0))
    top, left, bottom, right = boxes.unbind(1)
    height, width = bottom - top, right - left
    assert linear is None
    assert boxes.min() >= -1e-4
    assert boxes.max() <= 32 + 1e-4
    assert (width / height).max() <= 2.0 + 1e-4
    assert (height / width).max() <= 2.0 + 1e-4
    area = height * width / 32**2
    assert area.min() < 0.4
    assert area.max() > 0.9
    assert area.max() <= 1 + 1e-6


def test_shifts_are_whole_pixels_of_the_result_up_to_the_padding():
    view = RandomView(padding=0.125)
    boxes, _ = view.draw(2000, 32, 48, (32, 48), seeded(0))
    assert torch.allclose(boxes[:, 2] - boxes[:, 0], torch.tensor(32.0))
    assert sorted(boxes[:, 0].unique().tolist()) == list(range(-4, 5))
    assert sorted(boxes[:, 1].unique().tolist()) == list(range(-6, 7))
    images = noise(50, 32, 32)  # at the original size, a shift moves whole pixels
    found = show(view, images, (32, 32))
    assert torch.equal(found, found.round())
    upscaled, _ = view.draw(2000, 32, 32, (96, 96), seeded(0))
    assert len(upscaled[:, 0].unique()) == 25  # thirds of a pixel
    assert torch.allclose((upscaled * 3).round(), upscaled * 3, atol=1e-4)


def test_angles_are_within_their_limit():
    _, linear = RandomView(rotation=15).draw(2000, 32, 32, (32, 32), seeded(0))
    angles = linear[:, 0, 1].asin()
    assert math.radians(14.5) < angles.abs().max() <= math.radians(15)
    assert angles.mean().abs() < 0.02


@pytest.mark.parametrize("name", ALL_AUGMENTATIONS)
def test_64_equal_images_become_64_different_ones(photo, name):
    images = batch(photo(32, 32)).expand(64, -1, -1, -1)
    pixel_values, _ = augment(ALL_AUGMENTATIONS[name], images)
    assert pixel_values.shape == (64, 3, 48, 48)
    assert len({image.numpy().tobytes() for image in pixel_values}) == 64


@pytest.mark.parametrize("name", ALL_AUGMENTATIONS)
def test_generator_determines_every_augmentation(photo, name):
    images = batch(*(photo(32, 32, seed) for seed in range(8)))
    state = torch.get_rng_state()
    first = augment(ALL_AUGMENTATIONS[name], images, 7)
    again, other = (augment(ALL_AUGMENTATIONS[name], images, seed) for seed in (7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert images.dtype == torch.uint8


@pytest.mark.parametrize("name", ALL_AUGMENTATIONS)
def test_augmented_pixels_stay_in_the_models_range(photo, name):
    images = batch(*(photo(32, 32, seed) for seed in range(8)))
    pixel_values, _ = augment(ALL_AUGMENTATIONS[name], images)
    low, high = (PREPROCESSING.normalize(torch.full((1, 3, 1, 1), v)) for v in (0.0, 255.0))
    assert (pixel_values >= low - 1e-4).all()
    assert (pixel_values <= high + 1e-4).all()


def test_no_augmentation_equals_preprocessing(photo):
    images = batch(*(photo(32, 32, seed) for seed in range(4)))
    pixel_values, targets = augment(Augmentation(), images)
    assert torch.equal(pixel_values, PREPROCESSING(images))
    assert targets.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("policy", [Policy.trivial_augment(), Policy.rand_augment()])
def test_policy_draws_every_operation(photo, policy):
    """All images are equal: each result must come from one operation, and every operation must occur."""
    policy = Policy(policy.strengths, 1, policy.magnitude, deviation=0.0)
    images = batch(photo(32, 32)).expand(300, -1, -1, -1).float()
    changed, affine = policy(images, seeded(0))
    moved = (affine.linear != torch.eye(2)).any(dim=(1, 2)) | (affine.shift != 0).any(dim=1)
    recolored = (changed != images).any(dim=3).any(dim=2).any(dim=1)
    assert not (moved & recolored).any()  # one operation each
    assert 0.25 < moved.float().mean() < 0.45  # 5 of 14
    assert 0.40 < recolored.float().mean() < 0.62  # 8 of 14, of which a few may change nothing
    assert len(OPS) == 14


def test_rand_augment_magnitudes_are_near_their_mean(photo):
    _, affine = Policy.rand_augment(1, 0.3)(noise(2000).float(), seeded(0))
    angles = affine.linear[:, 0, 1].asin().rad2deg()
    turned = angles[(affine.linear[:, 0, 0] - 1).abs() > 1e-6].abs()
    assert 8.5 < turned.mean() < 9.5  # 0.3 of 30 degrees
    assert turned.std() > 0.3


@pytest.mark.parametrize("name", GEOMETRIC_OPS)
@pytest.mark.parametrize("amount", [0.5, -0.5])
def test_geometric_operations_equal_pillow(photo, name, amount):
    """Compare with Image.transform, which also maps output pixels to their sources."""
    picture = photo(32, 32)
    top = TRIVIAL_AUGMENT
    expected = {
        "shear_x": picture.transform(
            (32, 32), Image.Transform.AFFINE,
            (1, -amount * top.shear, 16 * amount * top.shear, 0, 1, 0), Image.Resampling.BICUBIC,
        ),
        "shear_y": picture.transform(
            (32, 32), Image.Transform.AFFINE,
            (1, 0, 0, -amount * top.shear, 1, 16 * amount * top.shear), Image.Resampling.BICUBIC,
        ),
        "translate_x": picture.transform(
            (32, 32), Image.Transform.AFFINE,
            (1, 0, amount * top.translate * 32, 0, 1, 0), Image.Resampling.BICUBIC,
        ),
        "translate_y": picture.transform(
            (32, 32), Image.Transform.AFFINE,
            (1, 0, 0, 0, 1, amount * top.translate * 32), Image.Resampling.BICUBIC,
        ),
        "rotate": picture.rotate(amount * top.rotate, Image.Resampling.BICUBIC),
    }[name]  # fmt: skip
    linear, shift = GEOMETRIC_OPS[name](torch.tensor([amount]), top)
    boxes, linear = combine_views(whole_image(32, 32), None, Affine(linear, shift * 32), 32, 32)
    found = sample_views(batch(picture), boxes, linear, (32, 32), "bicubic")
    inside = batch(np.asarray(expected)).sum(dim=1, keepdim=True) > 0  # Pillow fills with black
    inside = F.max_pool2d((~inside).float(), 7, 1, 3) == 0
    assert inside.float().mean() > 0.2
    # torch's cubic kernel is a little sharper than Pillow's.
    assert ((found - batch(expected)).abs() * inside).max() <= 4


COLOR_IN_PILLOW = {
    "brightness": lambda image: ImageEnhance.Brightness(image).enhance(1 + 0.5 * 0.9),
    "contrast": lambda image: ImageEnhance.Contrast(image).enhance(1 + 0.5 * 0.9),
    "saturation": lambda image: ImageEnhance.Color(image).enhance(1 + 0.5 * 0.9),
    "sharpness": lambda image: ImageEnhance.Sharpness(image).enhance(1 + 0.5 * 0.9),
    "solarize": lambda image: ImageOps.solarize(image, 128),
    "posterize": lambda image: ImageOps.posterize(image, 6),
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
}


@pytest.mark.parametrize("name", COLOR_OPS)
def test_color_operations_equal_pillow(photo, name):
    pictures = [photo(24, 32, seed) for seed in range(3)]
    expected = batch(*(COLOR_IN_PILLOW[name](picture) for picture in pictures))
    found = COLOR_OPS[name](batch(*pictures).float(), torch.full((3,), 0.5), RAND_AUGMENT)
    # Pillow rounds the other image and truncates the result.
    assert (found - expected).abs().max() <= 1.5


@pytest.mark.parametrize("name", COLOR_OPS)
def test_every_image_has_its_own_strength(photo, name):
    images = batch(*(photo(16, 16, seed) for seed in range(5))).float()
    amount = torch.tensor([-0.9, -0.2, 0.0, 0.3, 1.0])
    together = COLOR_OPS[name](images, amount, TRIVIAL_AUGMENT)
    for n in range(5):
        alone = COLOR_OPS[name](images[n : n + 1], amount[n : n + 1], TRIVIAL_AUGMENT)
        assert torch.allclose(together[n], alone[0], atol=1e-3)


@pytest.mark.parametrize("name", [n for n in COLOR_OPS if n not in ("autocontrast", "equalize")])
def test_strength_zero_changes_nothing(photo, name):
    images = batch(photo(16, 16)).float()
    found = COLOR_OPS[name](images, torch.zeros(1), TRIVIAL_AUGMENT)
    assert torch.allclose(found, images, atol=1e-3)


def test_constant_image_survives_every_color_operation():
    flat = torch.full((2, 3, 8, 8), 77.0)
    for name, change in COLOR_OPS.items():
        found = change(flat, torch.tensor([0.4, -0.4]), TRIVIAL_AUGMENT)
        assert torch.isfinite(found).all(), name
    assert torch.equal(color.autocontrast(flat), flat)


def test_hue_keeps_grey_and_luma(photo):
    images = batch(photo(16, 16), photo(16, 16, 1)).float() * 0.3 + 90  # away from 0 and 255
    found = color.hue(images, torch.tensor([0.25, -0.4]))
    assert torch.allclose(color.luma(found), color.luma(images), atol=0.6)
    assert (found - images).abs().max() > 3
    assert torch.allclose(color.hue(found, torch.tensor([-0.25, 0.4])), images, atol=0.1)
    grey = torch.full((1, 3, 4, 4), 130.0)
    assert torch.allclose(color.hue(grey, torch.tensor([0.3])), grey, atol=0.2)


def test_color_jitter_is_within_its_strength():
    white = torch.full((500, 3, 4, 4), 100.0)
    found = color_jitter(white, 0.3, 0.0, seeded(0))[:, 0, 0, 0] / 100
    assert 0.69 < found.min() < 0.75  # only the brightness of a constant image changes
    assert 1.25 < found.max() < 1.31


def test_view_of_a_transformed_image_is_one_view_of_the_image(photo):
    """Compare two passes, a policy's rotation and then a crop, with one pass that does both."""
    images = batch(photo(64, 64), photo(64, 64, 1))
    turn = Affine(rotation(torch.tensor([0.2, -0.3])), torch.tensor([[2.0, -3.0], [4.0, 1.0]]))
    boxes, linear = combine_views(whole_image(64, 64).expand(2, 4), None, turn, 64, 64)
    turned = sample_views(images, boxes, linear, (64, 64), "bicubic")
    crop = torch.tensor([[20.0, 18.0, 44.0, 42.0], [22.0, 46.0, 46.0, 22.0]])
    expected = resample(turned, crop, (24, 24))
    found = sample_views(images, *combine_views(crop, None, turn, 64, 64), (24, 24), "bicubic")
    assert (found - expected).abs().mean() < 1.0


def test_affine_maps_compose():
    first = Affine(rotation(torch.tensor([0.3])), torch.tensor([[1.0, 2.0]]))
    second = Affine(shear(torch.tensor([0.1]), torch.tensor([0.2])), torch.tensor([[3.0, -1.0]]))
    point = torch.tensor([5.0, 7.0])
    through = second.linear[0] @ point + second.shift[0]
    through = first.linear[0] @ through + first.shift[0]
    both = first.then(second)
    assert torch.allclose(both.linear[0] @ point + both.shift[0], through, atol=1e-5)


def test_erased_boxes_have_the_configured_sizes():
    ones = torch.ones(1000, 3, 32, 32)
    found = erase(ones, 0.4, seeded(0))
    erased = 1 - found[:, 0].mean(dim=(1, 2))
    assert torch.equal(found[:, 0], found[:, 2])
    assert 0.34 < (erased > 0).float().mean() < 0.46
    assert erased[erased > 0].min() > 0.01
    assert 0.28 < erased.max() < 0.37
    for mask in found[erased > 0][:20, 0]:
        rows, columns = (mask == 0).any(dim=1).sum(), (mask == 0).any(dim=0).sum()
        assert (mask == 0).sum() == rows * columns  # one full box


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_equal_the_shares_of_pixels(mixup, cutmix):
    """Every pixel of image n is n, so the mean of a mixed image determines both shares."""
    values = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 3, 24, 24)
    mixed, targets = mix(values, torch.eye(10), mixup, cutmix, seeded(1))
    assert torch.allclose(targets.sum(dim=1), torch.ones(10), atol=1e-5)
    assert torch.allclose(mixed.mean(dim=(1, 2, 3)), targets @ torch.arange(10.0), atol=1e-3)
    shares = targets.diagonal()
    assert len({round(float(share), 4) for share in shares}) > 4  # one draw for each image
    patchy = torch.tensor([len(image.unique()) == 2 for image in mixed])
    if not mixup:
        assert patchy.sum() >= 6
    if not cutmix:
        assert not patchy.any()
