"""hf_cifar.deploy.graph: preprocessing for images of unknown size equals that of a known one, bit for bit."""

import pytest
import torch
from torch.export import Dim

from hf_cifar.deploy.graph import PixelGraph
from hf_cifar.errors import UserError
from hf_cifar.transforms.preprocessing import Preprocessing

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
VIEWS = {
    "crop": Preprocessing(28, (25, 25), "bicubic", **HALF),
    "crop of another shape than the input": Preprocessing((24, 20), (30, 13), "bilinear", **HALF),
    "lanczos": Preprocessing((24, 24), None, "lanczos", **HALF),
    "box": Preprocessing((24, 24), (20, 20), "box", **HALF),
    "torchvision, crop": Preprocessing(
        28, (24, 24), "bicubic", **HALF, library="torchvision", crop_rounds_down=True
    ),
    "torchvision, squash": Preprocessing(
        (24, 20), None, "bilinear", **HALF, library="torchvision", crop_rounds_down=True
    ),
    "border after resizing": Preprocessing((24, 24), None, "bicubic", **HALF, border=(9, 20, 130)),
    "border before resizing": Preprocessing(
        (24, 24), None, "bicubic", **HALF, border=(9, 20, 130), border_first=True,
        library="torchvision",
    ),
    "no resizing": Preprocessing(None, (24, 24), "bilinear", **HALF),
}  # fmt: skip
SIZES = ((40, 50), (24, 24), (28, 28), (16, 17), (300, 17), (17, 300), (1, 1), (2, 9), (501, 333))


@pytest.mark.parametrize("name", VIEWS)
def test_pixels_of_any_size_equal_those_of_view(name):
    sizes = {axis: Dim(word) for axis, word in enumerate(("batch", "height", "width"))}
    example = torch.zeros(2, 40, 50, 3, dtype=torch.uint8)
    graph = torch.export.export(PixelGraph(VIEWS[name]), (example,), dynamic_shapes=(sizes,))
    run, generator = graph.module(), torch.Generator().manual_seed(0)
    for height, width in SIZES:
        if VIEWS[name].border_first and height == width == 1:
            continue  # torch.export refuses a square of one pixel; ONNX Runtime does not
        images = torch.randint(
            0, 256, (3, height, width, 3), dtype=torch.uint8, generator=generator
        )
        expected = VIEWS[name].view(images.permute(0, 3, 1, 2))
        assert torch.equal(run(images), expected), (height, width)


def test_a_border_of_another_shape_than_a_square_is_refused():
    view = Preprocessing((24, 20), None, "bicubic", **HALF, border=(9, 20, 130), border_first=True)
    with pytest.raises(UserError, match="pads images to 24 x 20 pixels, and only squares"):
        PixelGraph(view)


def test_an_input_without_a_fixed_size_is_refused():
    with pytest.raises(UserError, match="no fixed output size"):
        PixelGraph(Preprocessing(28, None, "bicubic", **HALF))
