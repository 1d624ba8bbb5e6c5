"""Image files for the tests, and their expected pixels."""

import io
import struct
import zlib

import numpy as np

# How a stored picture is turned or mirrored for display, by its EXIF orientation (EXIF 2.3, tag 0x0112).
ORIENTATION = 0x0112
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def encode(image, form="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey_rgb(grey):
    return np.repeat(np.asarray(grey, float)[..., None], 3, axis=2)


def over_white(rgb, alpha):
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def png16(samples):
    """A PNG of 16 bits: samples [H, W, 1 to 4] uint16, grey or RGB, the last of two or four is alpha."""
    height, width, channels = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def tiff(
    samples, *, order="<", deflate=False, predictor=1, planar=False, tile=None, rows=4, **tags
):
    """A TIFF of any type: samples [H, W, channels]. rows: of a strip; tile: the side of tiles, instead.

    tags: further numbers by tag number, as `t262=1`.
    """
    height, width, channels = samples.shape
    size, kind = samples.dtype.itemsize, {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    planes = [samples[..., c : c + 1] for c in range(channels)] if planar else [samples]
    down, across = (tile, tile) if tile else (rows, width)
    blocks = []
    for plane in planes:
        for top in range(0, height, down):
            for left in range(0, width, across):
                block = plane[top : top + down, left : left + across]
                if tile:
                    missing = (tile - block.shape[0], tile - block.shape[1])
                    block = np.pad(block, ((0, missing[0]), (0, missing[1]), (0, 0)))
                block = _predicted(np.ascontiguousarray(block), predictor, order)
                blocks.append(zlib.compress(block) if deflate else block)
    places = 8 + np.cumsum([0, *map(len, blocks)])[:-1]
    first, second = (324, 325) if tile else (273, 279)
    page = {
        256: [width], 257: [height], 258: [8 * size] * channels, 259: [8 if deflate else 1],
        262: [2 if channels >= 3 else 1], 277: [channels], 284: [2 if planar else 1], 317: [predictor],
        339: [kind] * channels, first: places.tolist(), second: [len(block) for block in blocks],
        **({322: [tile], 323: [tile]} if tile else {278: [rows]}),
        **{int(name[1:]): [value] for name, value in tags.items()},
    }  # fmt: skip
    start = 8 + sum(map(len, blocks))
    after, entries, longer = start + 2 + 12 * len(page) + 4, b"", b""
    for tag, numbers in sorted(page.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, longer = struct.pack(f"{order}I", after + len(longer)), longer + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    directory = struct.pack(f"{order}H", len(page)) + entries + bytes(4) + longer
    return header + b"".join(blocks) + directory


def _predicted(block, predictor, order):
    """The bytes of a block [H, W, channels], as differences of neighbours if `predictor` is 2 or 3."""
    height, _, channels = block.shape
    size = block.dtype.itemsize
    if predictor == 2:
        whole = block.view(f"u{size}")
        block = np.diff(whole, axis=1, prepend=np.zeros((height, 1, channels), whole.dtype))
    if predictor == 3:
        planes = block.astype(block.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
        planes = planes.reshape(height, -1, size).transpose(0, 2, 1).reshape(height, -1, channels)
        return np.diff(planes, axis=1, prepend=np.zeros((height, 1, channels), np.uint8)).tobytes()
    return block.astype(block.dtype.newbyteorder(order)).tobytes()
