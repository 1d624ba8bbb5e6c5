import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    ConvNextImageProcessor,
    EfficientNetImageProcessor,
    TimmWrapperConfig,
    ViTImageProcessor,
)

from hf_cifar.models.processor import plain_processor, timm_processor, transformers_processor
from hf_cifar.transforms.preprocessing import Preprocessing

PROCESSORS = {
    "vit": lambda: ViTImageProcessor(size={"height": 32, "width": 32}),
    "bit": lambda: BitImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}
    ),
    "bit without crop": lambda: BitImageProcessor(size={"shortest_edge": 36}, do_center_crop=False),
    "convnext": lambda: ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875),
    "no resize": lambda: ViTImageProcessor(do_resize=False),
}


def border_seen(processor, size):
    """True if a mark on the outermost pixels of an image reaches the model."""
    image = Image.new("RGB", (size, size))
    image.paste((255, 255, 255), (0, 0, size, 1))
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    return pixels[0, :, 0].mean() > pixels[0, :, size // 2].mean() + 0.5


@pytest.mark.parametrize("size", [32, 48, 400])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processor_shows_the_whole_image_at_the_size(name, size, tmp_path):
    original = PROCESSORS[name]()
    processor = transformers_processor(original, size)
    assert type(processor) is type(original)
    assert border_seen(processor, size)
    for shape in ((50, 40), (40, 50), (size, size)):
        pixels = processor(Image.new("RGB", shape), return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, size, size)
    assert Preprocessing.from_image_processor(processor).size == (size, size)
    for key in ("image_mean", "image_std", "resample", "rescale_factor"):
        assert processor.to_dict()[key] == original.to_dict()[key]
    processor.save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_original_processor_is_not_changed():
    original = PROCESSORS["bit"]()
    before = original.to_dict()
    transformers_processor(original, 48)
    assert original.to_dict() == before


def test_timm_processor_is_written_into_the_config():
    config = TimmWrapperConfig(
        architecture="test_resnet",
        pretrained_cfg={
            "input_size": [3, 160, 160], "crop_pct": 0.9, "interpolation": "bicubic",
            "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6],
        },
    )  # fmt: skip
    processor = timm_processor(config, 64)
    assert config.pretrained_cfg["input_size"] == [3, 64, 64]
    assert (config.pretrained_cfg["crop_pct"], config.pretrained_cfg["crop_mode"]) == (
        1.0,
        "center",
    )
    assert config.pretrained_cfg["mean"] == [0.1, 0.2, 0.3]
    view = Preprocessing.from_image_processor(processor)
    assert (view.size, view.std) == ((64, 64), (0.4, 0.5, 0.6))
    assert border_seen(processor, 64)


def test_plain_processor_divides_by_255():
    image = Image.new("RGB", (28, 28), (0, 51, 255))
    pixels = plain_processor(28)(image, return_tensors="pt")["pixel_values"]
    expected = torch.tensor([0.0, 0.2, 1.0]).view(1, 3, 1, 1).expand(1, 3, 28, 28)
    torch.testing.assert_close(pixels, expected)


MODES = {
    **PROCESSORS,
    "efficientnet": lambda: EfficientNetImageProcessor(size={"height": 32, "width": 32}),
    "without rescaling": lambda: ViTImageProcessor(
        do_rescale=False, image_mean=[120.0, 130, 140], image_std=[60.0, 61, 62]
    ),
}


@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
@pytest.mark.parametrize("name", MODES)
def test_processor_of_any_checkpoint_takes_any_mode(name, mode, tmp_path):
    """The saved processor, which a plain pipeline uses, does what training and evaluation do."""
    original = MODES[name]()
    processor = transformers_processor(original, 32, mode)
    view = Preprocessing.from_image_processor(processor)
    assert (view.size, view.resize_mode) == ((32, 32), mode)
    before = Preprocessing.from_image_processor(transformers_processor(original, 32))
    grey = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    torch.testing.assert_close(view(grey), before(grey))
    assert view.interpolation == before.interpolation
    processor.save_pretrained(tmp_path)
    again = AutoImageProcessor.from_pretrained(tmp_path)
    assert Preprocessing.from_image_processor(again) == view
    for shape in ((50, 20), (20, 50), (32, 32)):
        image = shapes(*shape)
        expected = again(image, return_tensors="pt")["pixel_values"]
        found = view(torch.tensor(np.asarray(image)).permute(2, 0, 1)[None])
        assert (found - expected).abs().max() <= 1e-3


def shapes(width, height):
    """A picture whose left edge is red, right edge green, and the rest blue."""
    image = Image.new("RGB", (width, height), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, width // 5, height))
    image.paste((0, 255, 0), (width - width // 5, 0, width, height))
    return image


@pytest.mark.parametrize("name", PROCESSORS)
def test_modes_show_what_they_are_called_for(name):
    def pixels(mode, width, height):
        processor = transformers_processor(PROCESSORS[name](), 32, mode)
        view = Preprocessing.from_image_processor(processor)
        image = torch.tensor(np.asarray(shapes(width, height))).permute(2, 0, 1)[None]
        return view.view(image)[0]

    edge = [255, 0, 0]
    assert (pixels("crop", 80, 32)[:, 16, 0] - torch.tensor(edge)).abs().max() > 100
    assert (pixels("squash", 80, 32)[:, 16, 0] - torch.tensor(edge)).abs().max() < 10
    padded = pixels("pad", 80, 32)
    assert (padded[:, 16, 0] - torch.tensor(edge)).abs().max() < 10
    assert (padded[:, :8] - padded[:, :1, :1]).abs().max() == 0  # the border


@pytest.mark.parametrize(
    ("mode", "saved"),
    [("crop", "center"), ("squash", "squash"), ("pad", "border"), (None, "squash")],
)
def test_a_timm_model_records_the_mode(mode, saved):
    config = TimmWrapperConfig(
        architecture="test_resnet",
        pretrained_cfg={
            "input_size": [3, 160, 160], "crop_pct": 0.9, "crop_mode": "squash", "mean": [0.1, 0.2, 0.3],
            "interpolation": "bicubic", "std": [0.4, 0.5, 0.6],
        },
    )  # fmt: skip
    view = Preprocessing.from_image_processor(timm_processor(config, 64, mode))
    assert config.pretrained_cfg["crop_mode"] == saved
    assert (view.size, view.resize_mode) == ((64, 64), mode or "squash")


@pytest.mark.parametrize("mode", [None, "crop", "squash", "pad"])
def test_plain_processor_takes_any_mode(mode):
    view = Preprocessing.from_image_processor(plain_processor(28, mode))
    assert (view.size, view.resize_mode) == ((28, 28), mode or "squash")
