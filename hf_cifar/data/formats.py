"""What a file is, by its first bytes: an image that can be decoded, or a picture that cannot."""

from __future__ import annotations

import re

HEIC_BRANDS = {
    b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1",
}  # fmt: skip
AVIF_BRANDS = {b"avif", b"avis"}


def _starting_with(*patterns: bytes) -> re.Pattern[bytes]:
    return re.compile(b"|".join(patterns), re.DOTALL)


IMAGES = _starting_with(
    rb"\xff\xd8\xff",  # JPEG
    rb"\x89PNG\r\n\x1a\n",
    rb"GIF8[79]a",
    rb"RIFF.{4}WEBP",
    rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}",
    rb"II[*+]\0|MM\0[*+]",  # TIFF and BigTIFF
    rb"\0{3}\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51\0",  # JPEG 2000
    rb"P[1-6f]\s+[#\d]|P7 332|Py(?:CMYK|P)\s",  # PBM, PGM, PPM, PFM, XV thumbnails
    rb"8BPS\0\x01|Image type: ",  # Photoshop, IFUNC
    rb"qoif|DDS |BLP[12]|FTEX|SIMPLE  =|.{20}GIMP",
    rb"\x01\xda[\0\x01][\x01\x02]|\x59\xa6\x6a\x95|DanM|Lin\x53|\x80\xe8\0\0",  # SGI, Sun, MSP, PIXAR
    rb"\x0a[\0\x02-\x05][\0\x01][\x01\x02\x04\x08]|\xb1\x68\xde\x3a",  # PCX, DCX
    rb"/\* XPM \*/|\s*#define\s+\S+_width\s",
    # TGA has no signature, but its colour map, image type, size and depth limit each other.
    rb".\0[\x02\x03\x0a\x0b]\0{5}.{4}(?!\0\0)..(?!\0\0)..[\x08\x0f\x10\x18\x20]",
    rb".\x01[\x01\x09]\0\0..[\x0f\x10\x18\x20].{4}(?!\0\0)..(?!\0\0)..\x08",
)
RAW = _starting_with(
    rb"II\*\0\x10\0\0\0CR|II(?:RO|RS|U\0)|MMOR|FUJIFILMCCD-RAW|FOVb|\0MRM|.{4}ftypcrx "
)
RAW_KIND = "a camera raw file"
OTHERS = {
    "a JPEG XL image": _starting_with(rb"\xff\x0a|\0{3}\x0cJXL \r\n\x87\n"),
    "an SVG drawing": _starting_with(
        rb"(?:\xef\xbb\xbf)?\s*(?:<svg\b|<!DOCTYPE svg\b|<\?xml\b.*<svg\b)"
    ),
    "a PDF document": _starting_with(rb"\s*%PDF-"),
    "a PostScript file": _starting_with(rb"%!PS|\xc5\xd0\xd3\xc6"),
    "an icon": _starting_with(rb"\0\0[\x01\x02]\0[^\0]\0|icns"),
    "a video": _starting_with(
        rb"RIFF.{4}AVI |\x1a\x45\xdf\xa3|\0\0\x01[\xb3\xba]|FLV\x01|\x30\x26\xb2\x75\x8e\x66\xcf\x11",
        rb"OggS|.{4}(?:ftyp|moov|mdat|wide)",
    ),
    "a DICOM file": _starting_with(rb".{128}DICM"),
}


def looks_like_image(head: bytes) -> bool:
    """True if a file that begins with these bytes (at least 32) is in a format that `decode_image` reads.

    True for HEIC even without pillow-heif: decoding then says what to install.
    """
    if RAW.match(head):
        return False
    return is_heic(head) or bool(_brands(head) & AVIF_BRANDS or IMAGES.match(head))


def is_heic(head: bytes) -> bool:
    """True for HEIC and HEIF, which Pillow reads with pillow-heif only."""
    brands = _brands(head)
    return bool(brands & HEIC_BRANDS) and not brands & AVIF_BRANDS


def foreign_kind(head: bytes) -> str | None:
    """Name a kind of picture that `decode_image` does not read, such as 'a camera raw file' or 'a video'.

    None for formats that it reads, and for all other files. SVG and DICOM need up to 1,000 bytes.
    """
    if RAW.match(head):
        return RAW_KIND
    if looks_like_image(head):
        return None
    return next((kind for kind, pattern in OTHERS.items() if pattern.match(head)), None)


def _brands(head: bytes) -> set[bytes]:
    """The brands of the ISO media formats, to which HEIC, AVIF and MP4 belong, in their first box."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12], *(head[start : start + 4] for start in range(16, end, 4))}


def text_kind(head: bytes) -> str:
    """Say what a file that no decoder knows is, by its first bytes (at least 64)."""
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run: git lfs pull"
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b", b"Rar!", b"7z\xbc\xaf")):
        return "it is an archive; unpack it"
    if re.match(rb"\s*<(!doctype\s+html|html|head|body)", head, re.IGNORECASE):
        return "it is a web page, probably from a failed download; download it again"
    return "not a known image format"
