import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    LlavaImageProcessor,
    ViTImageProcessor,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import (
    TimmWrapperImageProcessor,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_cifar.errors import UserError
from hf_cifar.transforms.preprocessing import Preprocessing
from hf_cifar.transforms.resampling import resample

SIZES = [(32, 32), (64, 96), (150, 101)]


def timm(**changes):
    config = {
        "input_size": [3, 64, 64], "interpolation": "bicubic", "crop_pct": 1.0,
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    return TimmWrapperImageProcessor(pretrained_cfg=config | changes, architecture="resnet18")


SQUARE = {"height": 64, "width": 64}
PROCESSORS = {
    "vit": ViTImageProcessor(size=SQUARE),
    "vit bicubic": ViTImageProcessor(size=SQUARE, resample=3),
    "vit wide": ViTImageProcessor(size={"height": 48, "width": 80}),
    "vit pil": ViTImageProcessorPil(size=SQUARE),
    "vit without normalisation": ViTImageProcessor(size=SQUARE, do_normalize=False),
    "vit without rescaling": ViTImageProcessor(size=SQUARE, do_rescale=False),
    "convnext crop": ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875),
    "convnext whole": ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=1.0),
    "convnext squash": ConvNextImageProcessor(size={"shortest_edge": 384}),
    "deit": DeiTImageProcessor(size={"height": 73, "width": 73}, crop_size=SQUARE),
    "efficientnet": EfficientNetImageProcessor(size=SQUARE, resample=3),
    "clip": CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=SQUARE),
    "clip crop": CLIPImageProcessor(size={"shortest_edge": 73}, crop_size=SQUARE),
    "timm whole": timm(),
    "timm crop": timm(crop_pct=0.875),
    "timm squash": timm(crop_pct=0.875, crop_mode="squash"),
    "timm bilinear": timm(crop_pct=0.95, interpolation="bilinear"),
    "timm pad": timm(crop_mode="border"),
    "timm wide pad": timm(input_size=[3, 48, 80], crop_mode="border", interpolation="bilinear"),
    "pad": LlavaImageProcessor(size=SQUARE, do_center_crop=False, do_pad=True),
    "pad and crop": LlavaImageProcessor(
        size={"shortest_edge": 73}, crop_size=SQUARE, do_pad=True, resample=2
    ),
    "vit crop": ViTImageProcessor(
        size={"shortest_edge": 64}, do_center_crop=True, crop_size=SQUARE
    ),
    "timm wide": timm(input_size=[3, 48, 80], crop_pct=0.9, crop_mode="squash"),
}


def tensor(image):
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)[None]


def levels(preprocessing):
    """Size of one level of 0..255 in normalised units, by channel."""
    return preprocessing.rescale_factor / torch.tensor(preprocessing.std).view(1, 3, 1, 1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PROCESSORS)
def test_agrees_with_the_image_processor(photo, name, size):
    image = photo(*size)
    preprocessing = Preprocessing.from_image_processor(PROCESSORS[name])
    expected = PROCESSORS[name](image, return_tensors="pt")["pixel_values"]
    found = preprocessing(tensor(image))
    assert found.shape == expected.shape
    assert found.shape[-2:] == preprocessing.size
    difference = ((found - expected) / levels(preprocessing)).abs()
    assert difference.max() <= 1e-3


@pytest.mark.parametrize("name", PROCESSORS)
def test_agrees_with_the_image_processor_on_noise(name):
    generator = np.random.default_rng(0)
    image = torch.tensor(generator.integers(0, 256, (1, 3, 32, 32), dtype=np.uint8))
    preprocessing = Preprocessing.from_image_processor(PROCESSORS[name])
    picture = Image.fromarray(image[0].permute(1, 2, 0).numpy())
    expected = PROCESSORS[name](picture, return_tensors="pt")
    difference = (preprocessing(image) - expected["pixel_values"]) / levels(preprocessing)
    assert difference.abs().max() <= 1e-3


def test_batches_are_processed_image_by_image(photo):
    images = torch.cat([tensor(photo(40, 60, seed)) for seed in range(3)])
    preprocessing = Preprocessing.from_image_processor(PROCESSORS["timm crop"])
    together = preprocessing(images)
    for n in range(3):
        assert torch.allclose(together[n], preprocessing(images[n : n + 1])[0], atol=1e-5)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_uncropped_loses_nothing(photo, name, size):
    """A view of the uncropped view equals the view of the image; streaming relies on this."""
    image = tensor(photo(*size))
    preprocessing = Preprocessing.from_image_processor(PROCESSORS[name])
    early = preprocessing.uncropped().view(image).round().to(torch.uint8)
    # Two odd margins, each rounded to whole pixels, may differ by a pixel from their rounded sum.
    tolerance = 10 if name in ("convnext crop", "clip crop") else 2
    assert (preprocessing.view(early) - preprocessing.view(image)).abs().max() <= tolerance


def test_image_of_the_right_size_is_unchanged(photo):
    image = tensor(photo(64, 64))
    preprocessing = Preprocessing.from_image_processor(PROCESSORS["vit"])
    assert torch.equal(preprocessing.view(image), image.float())


def test_enlarged_shows_the_same_part():
    for name in ("timm crop", "clip", "vit"):
        preprocessing = Preprocessing.from_image_processor(PROCESSORS[name])
        large = preprocessing.enlarged(2)
        assert large.size == (128, 128)
        assert (large.box(128, 160) - preprocessing.box(128, 160)).abs().max() <= 2


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_a_long_narrow_image_is_not_enlarged_as_a_whole(shape):
    """Its shorter side becomes 64 pixels, and the other one 3,840,000, of which the crop keeps 64."""
    preprocessing = Preprocessing(64, (64, 64), "bilinear", (0.5,) * 3, (0.5,) * 3)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    view = preprocessing.view_image(image)
    assert view.shape == (64, 64, 3)
    expected = preprocessing.view(torch.tensor(image).permute(2, 0, 1)[None])[0]
    assert np.array_equal(view, expected.permute(1, 2, 0).numpy())


def test_a_border_that_makes_an_image_too_large_is_refused():
    square = Preprocessing(
        (64, 64), None, "bilinear", (0.5,) * 3, (0.5,) * 3, border=(0, 0, 0), border_first=True
    )
    with pytest.raises(UserError, match="it would have 60,000 x 60,000 pixels"):
        square.view(torch.zeros(1, 3, 1, 60_000, dtype=torch.uint8))


def test_unknown_processors_are_refused():
    with pytest.raises(UserError, match="crops with mode 'corner'; only center, squash and border"):
        Preprocessing._from_timm(timm().data_config | {"crop_mode": "corner"})
    with pytest.raises(UserError, match=r"adds a border and crops to 0\.9 of the result"):
        Preprocessing.from_image_processor(timm(crop_mode="border", crop_pct=0.9))
    with pytest.raises(UserError, match="sets do_pad, which is not supported"):
        Preprocessing.from_image_processor(ViTImageProcessor(size=SQUARE, do_pad=True))
    with pytest.raises(UserError, match="crops to 48 x 80 pixels; only square crops are supported"):
        Preprocessing.from_image_processor(timm(input_size=[3, 48, 80]))
    with pytest.raises(UserError, match="resizes with 'nearest'; supported are"):
        Preprocessing.from_image_processor(ViTImageProcessor(size=SQUARE, resample=0))
    odd = ViTImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    with pytest.raises(UserError, match=r"resizes by .*longest_edge.*not supported"):
        Preprocessing.from_image_processor(odd)
    offset = EfficientNetImageProcessor(size=SQUARE, rescale_offset=True)
    with pytest.raises(UserError, match="sets rescale_offset, which is not supported"):
        Preprocessing.from_image_processor(offset)


def test_image_dependent_size_is_refused():
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, do_center_crop=False)
    with pytest.raises(UserError, match="no fixed output size; pass --image_size"):
        Preprocessing.from_image_processor(processor).size  # noqa: B018


def test_view_each_equals_view_of_single_images(photo):
    preprocessing = Preprocessing(18, (16, 16), "bicubic", (0.5,) * 3, (0.5,) * 3)
    sizes = [(20, 30), (16, 16), (20, 30), (50, 24), (16, 16)]
    images = [np.asarray(photo(*size, seed)) for seed, size in enumerate(sizes)]
    found = preprocessing.view_each(images, torch.device("cpu"))
    for view, image in zip(found, images, strict=True):
        alone = preprocessing.view(torch.tensor(image).permute(2, 0, 1)[None])
        assert torch.allclose(view, alone[0], atol=1e-3)


PADDED = ["timm pad", "timm wide pad", "pad", "pad and crop"]


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("size", [(300, 20), (20, 300), (31, 33), (1, 90)], ids=str)
def test_borders_of_any_shape_agree_with_the_image_processor(photo, name, size):
    image = photo(*size)
    preprocessing = Preprocessing.from_image_processor(PROCESSORS[name])
    expected = PROCESSORS[name](image, return_tensors="pt")["pixel_values"]
    difference = (preprocessing(tensor(image)) - expected) / levels(preprocessing)
    assert difference.abs().max() <= 1e-3


@pytest.mark.parametrize("name", ["timm pad", "pad"])
def test_the_border_is_the_mean_colour(photo, name):
    preprocessing = Preprocessing.from_image_processor(PROCESSORS[name])
    assert preprocessing.resize_mode == "pad"
    pixel_values = preprocessing(tensor(photo(64, 16)))
    assert (pixel_values[..., :20].abs() < 0.02).all()
    assert (pixel_values[..., -20:].abs() < 0.02).all()
    assert (pixel_values[..., 30:34].abs() > 0.1).any()


def test_a_stored_view_with_a_border_is_not_given_another(photo):
    preprocessing = Preprocessing.from_image_processor(PROCESSORS["pad"])
    stored = preprocessing.enlarged(8 / 7)
    assert stored.size == (73, 73)
    view = stored.view(tensor(photo(100, 40)))
    assert torch.equal(preprocessing.shaped(view), view)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit", (0, 0, 60, 90)), ("pad", (0, 0, 90, 90)), ("timm pad", (0, 0, 90, 90)),
        ("clip", (0, 15, 60, 75)),
    ],
)  # fmt: skip
def test_random_views_vary_what_evaluation_shows(photo, name, part):
    image = tensor(photo(60, 90))
    preprocessing = Preprocessing.from_image_processor(PROCESSORS[name])
    framed, box = preprocessing.frame(image)
    assert (box - torch.tensor([part])).abs().max() <= 1
    whole = resample(framed, box, preprocessing.size, preprocessing.interpolation)
    assert (whole - preprocessing.view(image)).abs().mean() <= 2
