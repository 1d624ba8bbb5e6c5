"""hf_cifar.data.jpeg: every pixel is Pillow's."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from hf_cifar.data.depth import TURNS, turned
from hf_cifar.data.jpeg import decode_jpeg


def picture(height=61, width=83):
    noise = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_those_of_pillow(subsampling, progressive, quality, mode):
    data = encoded(
        picture().convert(mode), subsampling=subsampling, progressive=progressive, quality=quality
    )
    found = decode_jpeg(data)
    assert found.dtype == np.uint8
    assert (found == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("cut", [1, 2, 10, 200, 1500])
def test_cut_files_are_left_to_pillow(cut):
    assert decode_jpeg(encoded(picture(200, 300))[:-cut]) is None


@pytest.mark.parametrize("orientation", [*TURNS, 0, 9])
def test_turned_like_pillow_turns(orientation):
    image = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (turned(decode_jpeg(data), orientation) == expected).all()
