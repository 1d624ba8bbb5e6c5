import io
import struct
import sys

import numpy as np
import pytest
from pictures import ORIENTATION, UPRIGHT, encode, grey_rgb, over_white, tiff
from PIL import Image

from hf_cifar.data import images
from hf_cifar.data.images import decode_cell, decode_image, pnm_bytes
from hf_cifar.errors import UserError

GENERATOR = np.random.default_rng(0)
RGB = GENERATOR.integers(0, 256, (6, 10, 3), dtype=np.uint8)
GREY = GENERATOR.integers(0, 256, (6, 10), dtype=np.uint8)
ALPHA = GENERATOR.integers(0, 256, (6, 10), dtype=np.uint8)


def close(found, expected, tolerance=0):
    assert found.dtype == np.uint8
    assert found.shape == np.shape(expected)
    return np.abs(found.astype(float) - expected).max() <= tolerance


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "PPM"])
def test_rgb_is_unchanged(form):
    assert close(decode_image(encode(Image.fromarray(RGB), form)), RGB)


def test_all_kinds_of_sources_have_the_same_pixels(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(RGB).save(path)
    sources = [path, str(path), path.read_bytes(), Image.open(path), Image.fromarray(RGB)]
    assert all(close(decode_image(source), RGB) for source in sources)


def test_grey_becomes_equal_channels():
    assert close(decode_image(encode(Image.fromarray(GREY))), grey_rgb(GREY))


def test_one_bit_becomes_black_and_white():
    bits = GREY > 127
    assert close(decode_image(encode(Image.fromarray(bits))), grey_rgb(bits * 255))


def test_palette_is_looked_up():
    image = Image.fromarray(RGB).quantize(16)
    assert close(decode_image(encode(image)), np.asarray(image.convert("RGB")))


def test_transparent_palette_entry_is_white():
    image = Image.fromarray(RGB).quantize(16)
    clear = int(np.asarray(image)[2, 3])
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.asarray(image) == clear] = 255
    assert close(decode_image(encode(image, transparency=clear)), expected)


def test_half_transparent_palette_is_blended_over_white():
    image = Image.fromarray(RGB).quantize(4)
    alphas = np.array([0, 80, 200, 255], np.uint8)
    expected = over_white(np.asarray(image.convert("RGB")), alphas[np.asarray(image)])
    assert close(decode_image(encode(image, transparency=alphas.tobytes())), expected, 1)


def test_transparent_colour_of_an_rgb_image_is_white():
    expected = RGB.copy()
    expected[1, 2] = 255
    colour = tuple(int(v) for v in RGB[1, 2])
    assert close(decode_image(encode(Image.fromarray(RGB), transparency=colour)), expected)


def test_rgba_is_composited_over_white():
    image = Image.fromarray(np.dstack((RGB, ALPHA)))
    assert close(decode_image(encode(image)), over_white(RGB, ALPHA), 1)


def test_grey_with_alpha_is_composited_over_white():
    image = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
    assert close(decode_image(encode(image)), over_white(grey_rgb(GREY), ALPHA), 1)


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA"])
def test_rare_alpha_modes_are_composited_over_white(mode):
    if mode == "PA":
        image = Image.fromarray(RGB).quantize(16).convert("PA")
        image.putalpha(0)
    else:
        straight = "RGBA" if mode == "RGBa" else "LA"
        image = Image.new(straight, (10, 6), 0).convert(mode)
    assert close(decode_image(image), np.full((6, 10, 3), 255))


@pytest.mark.parametrize("form", ["TIFF", "JPEG"])
def test_cmyk_is_inverted_ink(form):
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    options = {"quality": 100} if form == "JPEG" else {}
    assert close(decode_image(encode(ink, form, **options)), np.full((8, 8, 3), (255, 0, 0)), 3)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_is_rescaled_not_clipped(form):
    ramp = np.linspace(0, 65535, 60).round().astype(np.uint16).reshape(6, 10)
    found = decode_image(encode(Image.fromarray(ramp), form))
    assert close(found, grey_rgb((ramp / 257.0).round()))
    assert len(np.unique(found)) == 60


def test_big_endian_sixteen_bit_tiff_is_rescaled():
    ramp = np.linspace(0, 65535, 60).round().astype(np.uint16).reshape(6, 10)
    image = Image.frombytes("I;16B", (10, 6), ramp.astype(">u2").tobytes())
    assert close(decode_image(encode(image, "TIFF")), grey_rgb((ramp / 257.0).round()))


def test_sixteen_bit_pgm_is_rescaled():
    ramp = np.linspace(0, 65535, 60).round().astype(np.uint16).reshape(6, 10)
    raw = b"P5 10 6 65535\n" + ramp.astype(">u2").tobytes()
    assert close(decode_image(raw), grey_rgb((ramp / 257.0).round()))


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_float_tiff_is_rescaled(top):
    ramp = np.linspace(0, top, 60, dtype=np.float32).reshape(6, 10)
    found = decode_image(encode(Image.fromarray(ramp), "TIFF"))
    assert close(found, grey_rgb((ramp / top * 255).round()), 1)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for form in ("PNG", "TIFF"):
        found = decode_image(encode(Image.fromarray(RGB), form, exif=exif))
        assert close(found, UPRIGHT[orientation](RGB))


def test_exif_orientation_of_a_jpeg_is_applied():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    raw = encode(Image.fromarray(RGB), "JPEG", exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(raw)))
    assert close(decode_image(raw), np.rot90(stored, -1))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation_is_used(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if form == "WEBP" else {}
    raw = encode(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **lossless)
    with Image.open(io.BytesIO(raw)) as image:
        assert image.n_frames == 3
        image.seek(2)
        assert close(decode_image(image), np.full((8, 8, 3), (255, 0, 0)))
    assert close(decode_image(raw), np.full((8, 8, 3), (255, 0, 0)))


def test_decoding_does_not_change_the_callers_image():
    image = Image.fromarray(np.dstack((RGB, ALPHA)))
    decode_image(image)
    assert image.mode == "RGBA"
    assert (np.asarray(image) == np.dstack((RGB, ALPHA))).all()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_files_raise_only_user_errors():
    generator = np.random.default_rng(1)
    image = Image.fromarray(RGB)
    refused = 0
    for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "DDS", "PCX", "TGA"):
        whole = encode(image, form)
        for _ in range(40):
            damaged = bytearray(whole[: generator.integers(1, len(whole) + 1)])
            for _ in range(generator.integers(0, 5)):
                damaged[generator.integers(len(damaged))] = generator.integers(256)
            try:
                assert decode_image(bytes(damaged)).shape[2] == 3
            except UserError as error:
                assert str(error).startswith("cannot read image: ")
                assert "\n" not in str(error)
                refused += 1
    assert refused > 50


def test_unknown_dds_pixels_are_a_user_error():
    # Pillow raises NotImplementedError here, not an OSError.
    raw = bytearray(encode(Image.fromarray(RGB), "DDS"))
    raw[80:84] = (17).to_bytes(4, "little")
    with pytest.raises(UserError, match="cannot read image: Unknown pixel format"):
        decode_image(bytes(raw))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"some words", "not a known image format"),
        (b"", "the file is empty"),
        (b"PK\x03\x04", "it is an archive; unpack it"),
        (b"<html>not found</html>", "it is a web page, .*; download it again"),
        (b"\n<!DOCTYPE html>\n<html>", "it is a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "it is a Git LFS pointer; run: git lfs",
        ),
    ],
)
def test_other_files_are_refused(content, message):
    with pytest.raises(UserError, match=f"cannot read image: {message}"):
        decode_image(content)


def test_truncated_image_is_refused():
    raw = encode(Image.fromarray(np.tile(RGB, (8, 8, 1))), "JPEG")
    with pytest.raises(UserError, match=r"cannot read image: .*truncated"):
        decode_image(raw[: len(raw) // 2])


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no image file .*cat\.png"):
        decode_image(tmp_path / "cat.png")


def test_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"cannot read image: .*exceeds limit"):
        decode_image(encode(Image.fromarray(RGB)))


def test_an_image_above_the_limit_is_refused_before_it_is_decoded():
    raw = encode(Image.fromarray(RGB))
    assert decode_image(raw, max_pixels=60).shape == (6, 10, 3)
    cut = raw[:60]  # most pixels are missing, but are not read
    with pytest.raises(
        UserError, match=r"10 x 6 pixels exceed the limit of 59, see --max_image_pixels"
    ):
        decode_image(cut, max_pixels=59)


def test_formats_without_a_size_check_are_refused(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "icon.ico")
    with pytest.raises(UserError, match="it is an icon; convert it to PNG or JPEG"):
        decode_image(tmp_path / "icon.ico")


@pytest.mark.parametrize("form", ["AVIF", "JPEG2000", "WEBP", "QOI"])
def test_other_formats_are_read_whatever_the_file_is_called(tmp_path, form):
    ramp = np.repeat(np.linspace(0, 255, 32).astype(np.uint8)[:, None], 32, axis=1)
    path = tmp_path / "picture"
    path.write_bytes(encode(Image.fromarray(np.dstack([ramp] * 3)), form))
    assert close(decode_image(path), grey_rgb(ramp), 8)


def test_first_page_of_a_tiff_is_used():
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    raw = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert close(decode_image(raw), np.full((8, 8, 3), (255, 0, 0)))


def test_heic_is_read_with_pillow_heif():
    pytest.importorskip("pillow_heif")
    images._register_heic()
    raw = encode(Image.new("RGB", (64, 48), (200, 40, 90)), "HEIF", quality=95)
    assert close(decode_image(raw), np.full((48, 64, 3), (200, 40, 90)), 3)
    with pytest.raises(UserError, match="cannot read image: "):
        decode_image(raw[: len(raw) // 2])


def test_heic_without_pillow_heif_names_the_package(monkeypatch):
    images._register_heic.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(UserError, match=r"in HEIC format, .* run: pip install pillow-heif"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(2000))


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(200), "a camera raw file"),
        (tiff(RGB, t254=1), "a camera raw file"),  # the preview in a NEF or ARW file
        (tiff(RGB, t50706=1), "a camera raw file"),  # DNG
        (tiff(GREY[..., None].astype(np.uint16), t262=32803), "a camera raw file"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "an SVG drawing"),
        (b"%PDF-1.7 and so on", "a PDF document"),
        (b"\0\0\0\x18ftypisom" + bytes(60), "a video"),
    ],
)
def test_other_pictures_are_refused_by_name(raw, kind):
    with pytest.raises(UserError, match=f"cannot read image: it is {kind}; convert it to PNG or"):
        decode_image(raw)


def exif_of(*tags, count=None):
    """Make an EXIF block with these (tag, type, count, value), which claims to have `count` of them."""
    head = struct.pack("<4sIH", b"II*\0", 8, len(tags) if count is None else count)
    return b"Exif\0\0" + head + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)


TURNED, CAMERA = (0x0112, 3, 1, 6), (0x010F, 2, 4, 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (exif_of(TURNED), True),
        (exif_of((0x010F, 2, 4000, 5000), TURNED), True),  # another tag is damaged
        (exif_of(TURNED, count=60_000), True),  # truncated after it
        (exif_of(CAMERA), False),
        (b"Exif\0\0", False),
        (exif_of(CAMERA, count=60_000), None),
        (exif_of(TURNED)[:14], None),
        (b"Exif\0\0no header", None),
    ],
)
def test_damaged_exif_is_refused_if_the_orientation_is_unknown(form, exif, turned):
    raw = encode(Image.fromarray(RGB), form, exif=exif)
    if turned is None:
        with pytest.raises(UserError, match="its EXIF block is damaged"):
            decode_image(raw)
    else:
        assert decode_image(raw).shape == ((10, 6, 3) if turned else (6, 10, 3))


def test_cell_with_bytes_or_path(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(RGB).save(path)
    assert close(decode_cell({"bytes": path.read_bytes(), "path": "elsewhere.png"}), RGB)
    assert close(decode_cell({"bytes": None, "path": str(path)}), RGB)


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}])
def test_empty_cell_is_refused(cell):
    with pytest.raises(UserError, match="the cell is empty"):
        decode_cell(cell)


@pytest.mark.parametrize("pixels", [RGB, GREY], ids=["rgb", "grey"])
def test_pnm_bytes_decode_to_themselves(pixels):
    expected = pixels if pixels.ndim == 3 else grey_rgb(pixels)
    assert close(decode_image(pnm_bytes(pixels)), expected)
