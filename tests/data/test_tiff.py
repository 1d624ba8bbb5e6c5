import io

import numpy as np
import pytest
from pictures import tiff
from PIL import Image

from hf_cifar.data.tiff import TiffPage
from hf_cifar.errors import UserError

GENERATOR = np.random.default_rng(0)


def read(encoded):
    return TiffPage.open(io.BytesIO(encoded)).samples(encoded)


def drawn(dtype, channels, height=21, width=37):
    return (GENERATOR.normal(0, 3000, (height, width, channels))).astype(dtype)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "i4", "f4", "f8"])
@pytest.mark.parametrize(
    "layout",
    [
        {}, {"deflate": True}, {"planar": True}, {"tile": 16}, {"tile": 16, "planar": True, "deflate": True},
        {"deflate": True, "predictor": 2}, {"deflate": True, "predictor": 2, "tile": 16},
    ],
    ids=str,
)  # fmt: skip
def test_every_value_is_read(layout, dtype, channels, order):
    samples = drawn(dtype, channels)
    found = read(tiff(samples, order=order, **layout))
    assert found.dtype == samples.dtype
    assert (found == samples).all()


@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("order", "<>")
def test_differences_of_floats_are_undone(order, channels, tile):
    samples = drawn("f4", channels)
    assert (read(tiff(samples, order=order, deflate=True, predictor=3, tile=tile)) == samples).all()


def test_the_files_that_pillow_writes_are_read():
    values = GENERATOR.integers(0, 65536, (21, 37), dtype=np.uint16)
    for compression in (None, "tiff_lzw", "packbits", "tiff_adobe_deflate"):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "TIFF", compression=compression)
        assert (read(file.getvalue())[..., 0] == values).all()


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_samples_are_unpacked(bits):
    values = GENERATOR.integers(0, 2**bits, (5, 7, 1))
    places = (values >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(places.reshape(5, -1).astype(np.uint8), axis=1)
    encoded = tiff(rows[..., None], t256=7, t258=bits)
    assert (read(encoded) == values).all()


def test_channels_of_different_depth_are_refused():
    encoded = bytearray(tiff(drawn("u2", 3)))
    depths = encoded.rfind(b"\x10\0\0\0\x10\0\0\0\x10\0\0\0")
    encoded[depths] = 8
    with pytest.raises(UserError, match="the channels of this TIFF differ in depth"):
        read(bytes(encoded))
