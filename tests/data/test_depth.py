"""Images of more than 8 bits, from file to 8 bits."""

import io

import numpy as np
import pytest
from pictures import UPRIGHT, encode, grey_rgb, png16, tiff
from PIL import Image

from hf_cifar.config.data import DataConfig, ValueRange
from hf_cifar.data import depth, images
from hf_cifar.data.images import decode_cell, decode_image, find_value_range
from hf_cifar.errors import UserError

GENERATOR = np.random.default_rng(0)
TWELVE = GENERATOR.integers(0, 4096, (6, 10), dtype=np.uint16)
COLOUR = GENERATOR.integers(0, 4096, (6, 10, 3), dtype=np.uint16)
ALPHA = GENERATOR.integers(0, 65536, (6, 10, 1), dtype=np.uint16)
RANGE = ValueRange(100, 4000)


def scaled(values, low, high):
    return ((values.astype(float) - low) * 255 / (high - low)).round().clip(0, 255)


def pgm(values, maximum, kind="P5"):
    return f"{kind} 10 6 {maximum}\n".encode() + values.astype(">u2").tobytes()


def plain_pnm(values, kind):
    words = " ".join(map(str, values.reshape(-1).tolist()))
    return f"{kind} 10 6\n# a comment\n4095\n{words}\n".encode()


GREY_FILES = {
    "png": encode(Image.fromarray(TWELVE)),
    "png with alpha": png16(np.dstack((TWELVE, np.full_like(TWELVE, 65535)))),
    "tiff": encode(Image.fromarray(TWELVE), "TIFF"),
    "big-endian tiff": tiff(TWELVE[..., None], order=">"),
    "32-bit tiff": encode(Image.fromarray(TWELVE.astype(np.int32)), "TIFF"),
    "unsigned 32-bit tiff": tiff(TWELVE[..., None].astype(np.uint32)),
    "float tiff": encode(Image.fromarray(TWELVE.astype(np.float32)), "TIFF"),
    "double tiff": tiff(TWELVE[..., None].astype(np.float64)),
    "pgm": pgm(TWELVE, 4095),
    "16-bit pgm": pgm(TWELVE, 65535),
    "plain pgm": plain_pnm(TWELVE, "P2"),
    "pfm": encode(Image.fromarray(TWELVE.astype(np.float32)), "PPM"),
}
COLOUR_FILES = {
    "png": png16(COLOUR),
    "opaque png": png16(np.dstack((COLOUR, np.full_like(TWELVE, 65535)))),
    "tiff": tiff(COLOUR),
    "big-endian tiff": tiff(COLOUR, order=">"),
    "tiff of planes": tiff(COLOUR, planar=True),
    "float tiff": tiff(COLOUR.astype(np.float32)),
    "grey tiff of three channels": tiff(COLOUR, t262=1),
    "ppm": pgm(COLOUR, 4095, "P6"),
    "16-bit ppm": pgm(COLOUR, 65535, "P6"),
    "plain ppm": plain_pnm(COLOUR, "P3"),
}


@pytest.mark.parametrize("name", GREY_FILES)
def test_grey_is_scaled_by_the_range(name):
    found = decode_image(GREY_FILES[name], value_range=RANGE)
    assert (found == grey_rgb(scaled(TWELVE, 100, 4000))).all()


@pytest.mark.parametrize("name", COLOUR_FILES)
def test_colour_is_scaled_by_the_range_in_full(name):
    found = decode_image(COLOUR_FILES[name], value_range=RANGE)
    assert (found == scaled(COLOUR, 100, 4000)).all()
    assert len(np.unique(found)) > 100  # the high byte of 12 bits has 16 values


@pytest.mark.parametrize("source", ["path", "bytes", "opened"])
@pytest.mark.parametrize("name", ["png", "tiff", "ppm"])
def test_all_kinds_of_sources_have_the_same_pixels(tmp_path, name, source):
    path = tmp_path / f"image.{name[-4:]}"
    path.write_bytes(COLOUR_FILES[name])
    given = {"path": lambda: path, "bytes": path.read_bytes, "opened": lambda: Image.open(path)}
    found = decode_image(given[source](), value_range=RANGE)
    assert (found == scaled(COLOUR, 100, 4000)).all()
    assert (decode_cell({"bytes": None, "path": str(path)}, value_range=RANGE) == found).all()


def test_signed_values_are_scaled():
    scan = GENERATOR.integers(-1024, 3001, (6, 10, 1)).astype(np.int16)
    found = decode_image(tiff(scan), value_range=ValueRange(-1024, 3000))
    assert (found == grey_rgb(scaled(scan[..., 0], -1024, 3000))).all()
    whole = decode_image(tiff(scan))
    assert (whole == grey_rgb(scaled(scan[..., 0], -32768, 32767))).all()


def test_white_is_zero_is_inverted():
    inverted = tiff((65535 - TWELVE)[..., None], t262=0)
    assert (decode_image(inverted, value_range=RANGE) == grey_rgb(scaled(TWELVE, 100, 4000))).all()


@pytest.mark.parametrize(
    "encoded", [png16(np.dstack((COLOUR, ALPHA))), tiff(np.dstack((COLOUR, ALPHA)))]
)
def test_transparency_is_over_white(encoded):
    share = ALPHA / 65535
    expected = scaled(COLOUR, 100, 4000) * share + 255 * (1 - share)
    assert np.abs(decode_image(encoded, value_range=RANGE) - expected).max() <= 1


def test_values_that_are_no_numbers_are_black():
    values = TWELVE.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    found = decode_image(encode(Image.fromarray(values), "TIFF"), value_range=RANGE)
    assert found[0, :3, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = UPRIGHT[orientation](scaled(COLOUR, 100, 4000))
    assert (decode_image(tiff(COLOUR, t274=orientation), value_range=RANGE) == expected).all()
    grey = UPRIGHT[orientation](grey_rgb(scaled(TWELVE, 100, 4000)))
    for form in ("PNG", "TIFF"):
        encoded = encode(Image.fromarray(TWELVE), form, exif=exif)
        assert (decode_image(encoded, value_range=RANGE) == grey).all()


def test_a_large_scan_is_scaled_in_parts(monkeypatch):
    whole = decode_image(COLOUR_FILES["tiff"], value_range=RANGE)
    monkeypatch.setattr(depth, "VALUES_AT_ONCE", 25)
    assert (decode_image(COLOUR_FILES["tiff"], value_range=RANGE) == whole).all()


def test_images_of_eight_bits_do_not_change():
    rgb = GENERATOR.integers(0, 256, (6, 10, 3), dtype=np.uint8)
    for form in ("PNG", "TIFF", "PPM", "BMP"):
        assert (decode_image(encode(Image.fromarray(rgb), form), value_range=RANGE) == rgb).all()
    small = pgm(np.zeros(0), 100) + bytes(range(60))
    assert (decode_image(small) == decode_image(small, value_range=RANGE)).all()


def test_without_a_range_the_type_decides_and_a_line_says_so(caplog):
    images._note_full_range.cache_clear()
    for _ in range(2):
        assert (decode_image(png16(COLOUR)) == (COLOUR / 257).round()).all()
    assert caplog.text.count("scaled by the full range of their type") == 1
    declared = decode_image(pgm(TWELVE, 4095))
    assert (declared == grey_rgb(scaled(TWELVE, 0, 4095))).all()


@pytest.mark.parametrize("encoded", [tiff(np.dstack([COLOUR] * 2), t262=1), tiff(COLOUR[..., :2])])
def test_other_numbers_of_channels_are_refused(encoded):
    with pytest.raises(UserError, match=r"it has \d channels; grey and RGB are read"):
        decode_image(encoded)


def test_a_large_scan_is_refused_before_it_is_decoded():
    with pytest.raises(UserError, match="10 x 6 pixels exceed the limit of 59"):
        decode_image(tiff(COLOUR), max_pixels=59)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "encoded", [COLOUR_FILES["tiff"], COLOUR_FILES["png"], COLOUR_FILES["ppm"]]
)
def test_damaged_scans_raise_only_user_errors(encoded):
    generator, refused = np.random.default_rng(1), 0
    for _ in range(60):
        damaged = bytearray(encoded[: generator.integers(1, len(encoded) + 1)])
        for _ in range(generator.integers(0, 5)):
            damaged[generator.integers(len(damaged))] = generator.integers(256)
        try:
            assert decode_image(bytes(damaged)).shape[2] == 3
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 20


def cells_of(*encoded):
    return [{"bytes": each, "path": None} for each in encoded]


def test_the_range_of_training_images_leaves_out_the_rarest_values():
    scans = [GENERATOR.integers(1000, 3000, (64, 64), dtype=np.uint16) for _ in range(20)]
    scans[3][0, :3] = 60_000
    found = find_value_range(cells_of(*(encode(Image.fromarray(scan)) for scan in scans)))
    assert 1000 <= found.low <= 1005
    assert 2995 <= found.high <= 3000


def test_the_range_is_of_the_images_of_more_than_eight_bits():
    small = encode(Image.new("RGB", (8, 8), "white"))
    cells = cells_of(small, png16(COLOUR), b"damaged", encode(Image.new("RGB", (8, 8)), "JPEG"))
    assert find_value_range(cells) == find_value_range(cells[1:2])
    assert find_value_range([*cells[:1], *cells[2:], None]) is None
    assert find_value_range([]) is None


def test_the_range_of_equal_values_is_not_empty():
    flat = encode(Image.fromarray(np.full((4, 4), 700, np.uint16)))
    assert find_value_range(cells_of(flat)) == ValueRange(700, 701)


def test_the_range_of_fractions_is_found():
    values = np.linspace(-0.5, 0.75, 4000, dtype=np.float32).reshape(40, 100)
    found = find_value_range(cells_of(encode(Image.fromarray(values), "TIFF")))
    assert (found.low, found.high) == pytest.approx((-0.49875, 0.74875), abs=2e-3)


def test_cells_are_decoded_with_the_range():
    (cell,) = cells_of(COLOUR_FILES["png"])
    found = decode_cell(cell, value_range=RANGE)
    assert (found == scaled(COLOUR, 100, 4000)).all()


@pytest.mark.parametrize("text", ["0,4095", "-1024,3000", "0.25,0.75", "-3.5,1e+30"])
def test_a_range_is_read_as_it_is_written(text):
    assert ValueRange.parse(str(ValueRange.parse(text))) == ValueRange.parse(text)


@pytest.mark.parametrize("text", ["", "5", "3,1", "1,1", "a,b", "0,nan", "0,inf", "1,2,3"])
def test_other_ranges_are_refused(text):
    with pytest.raises(
        UserError, match=r"--value_range is '.*'; it takes LOW,HIGH, for example 0,4095"
    ):
        DataConfig(value_range=text)


def test_pillow_alone_cuts_such_values():
    """What the model card says about a plain pipeline, which calls `convert`."""
    for values in (TWELVE, TWELVE.astype(np.int32) - 100, TWELVE.astype(np.float32) + 0.75):
        file = io.BytesIO()
        Image.fromarray(values).save(file, "TIFF")
        plain = np.asarray(Image.open(file).convert("RGB"))
        assert (plain == grey_rgb(np.clip(np.trunc(values), 0, 255))).all()
    for encoded in (COLOUR_FILES["png"], COLOUR_FILES["tiff"]):
        assert (np.asarray(Image.open(io.BytesIO(encoded))) == COLOUR >> 8).all()
