import io

import numpy as np
import pytest
from PIL import Image

from hf_cifar.data.formats import foreign_kind, is_heic, looks_like_image

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
FORMATS = [
    "AVIF", "BMP", "DDS", "GIF", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF",
    "WEBP",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_images_are_known_by_their_first_bytes(form, mode):
    file = io.BytesIO()
    try:
        RGB.convert(mode).save(file, form)
    except (OSError, ValueError):
        pytest.skip(f"Pillow writes no {form} of mode {mode}")
    assert looks_like_image(file.getvalue()[:32])
    assert foreign_kind(file.getvalue()[:1000]) is None


@pytest.mark.parametrize(
    "head",
    [
        b"", b"plain text", b"BMW and other cars, in a list of cars", b"P1 is the first of the pictures",
        b"name,label\ncat.png,cat\n", b'{"file_name": "cat.png"}', b"PK\3\4" + bytes(40), bytes(64),
        b"\0\5\x16\7\0\2\0\0Mac OS X        ", b"\xef\xbb\xbfname;label\r\n", b"\x1f\x8b\x08" + bytes(40),
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(40), b"#define WIDTH 3\n#include <stdio.h>\n",
    ],
)  # fmt: skip
def test_other_files_are_no_images(head):
    assert not looks_like_image(head)
    assert foreign_kind(head) is None


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(40), "a camera raw file"),
        (b"FUJIFILMCCD-RAW 0201FF129502" + bytes(40), "a camera raw file"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(40), "a camera raw file"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(40), "a video"),
        (b"\x1a\x45\xdf\xa3" + bytes(40), "a video"),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(40), "a video"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg width="3">', "an SVG drawing"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'>", "an SVG drawing"),
        (b"%PDF-1.7\n" + bytes(40), "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(40), "a PostScript file"),
        (b"\xff\x0a" + bytes(40), "a JPEG XL image"),
        (bytes(128) + b"DICM" + bytes(40), "a DICOM file"),
        (b"\0\0\1\0\1\0 \0" + bytes(40), "an icon"),
    ],
)
def test_other_pictures_are_named(head, kind):
    assert foreign_kind(head) == kind
    assert not looks_like_image(head)


def test_heic_and_avif_are_told_apart():
    heic, avif = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf"
    assert is_heic(heic)
    assert not is_heic(avif)
    assert looks_like_image(heic)
    assert looks_like_image(avif)
