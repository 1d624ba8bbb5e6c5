"""Find duplicates: pairs of equal or nearly equal images, between two sets or within one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dct

from hf_cifar.platform import num_cores
from hf_cifar.threads import map_in_threads
from hf_cifar.transforms import LUMA

Array = np.ndarray
SIDE = 32  # px per side of the thumbnails that are hashed and compared
# Lowest frequencies kept in each direction: 63 bits, without the constant one, which has no information.
HASH_SIDE = 8
# Maximum number of different bits, of 63, for two thumbnails to be compared.
MAX_BITS = 10
# Two thumbnails are the same picture if, standardised to the same mean and contrast, they differ by at most
# this share of the contrast (root mean square). On 6,187 lossless images of CIFAR-10, JPEG at quality 75
# costs at most 0.32 and 4 bits; the six pairs within both limits each show the same scene.
MAX_DIFFERENCE = 0.4
# Many smaller images (px per side) look alike without being duplicates, so only equal ones count.
MIN_SIDE = 16
# A thumbnail with less contrast (standard deviation of 0..255) cannot be distinguished from others.
MIN_CONTRAST = 4.0
BATCH = 256  # thumbnails of images of one size that are computed at once
CHUNK = (
    16  # images of the first set at a time, so that the bit counts stay in the processor's cache
)


class Duplicate(NamedTuple):
    """A pair of images, by their positions in the first and second set.

    exact: every pixel is equal. difference: root mean square between the thumbnails, as a share of contrast.
    """

    first: int
    second: int
    exact: bool
    difference: float


def find_duplicates(
    first: Iterable[Array], second: Iterable[Array] | None = None
) -> list[Duplicate]:
    """Find pairs of equal or nearly equal images: exact ones first, then by increasing difference.

    first, second: uint8 [N, H, W, 3], or images [H, W, 3] of any sizes; without a second set, pairs within
    the first. Near duplicates are found by a perceptual hash, the signs of the lowest frequencies (Zauner
    2010), and confirmed by their thumbnails. This finds re-encoded, resized or uniformly brightened copies,
    not crops or mirror images.
    """
    return compare_fingerprints(
        _fingerprints(first), None if second is None else _fingerprints(second)
    )


class Fingerprints(NamedTuple):
    """Fingerprints of N images: a hash of all pixels, and thumbnails [N, 32, 32]."""

    digests: list[bytes]
    thumbnails: Array


def compare_fingerprints(
    first: Fingerprints, second: Fingerprints | None = None, *, near: bool = True
) -> list[Duplicate]:
    """Find pairs as `find_duplicates`, by the fingerprints of images. near: False for equal images only."""
    within, other = second is None, first if second is None else second
    exact = _exact_pairs(first.digests, other.digests, within=within)
    similar = _near_pairs(first.thumbnails, other.thumbnails, within=within) if near else {}
    pairs = [Duplicate(a, b, True, 0.0) for a, b in exact]
    pairs += sorted(
        (
            Duplicate(a, b, False, difference)
            for (a, b), difference in similar.items()
            if (a, b) not in exact
        ),
        key=lambda pair: pair.difference,
    )
    return pairs


def _fingerprints(images: Iterable[Array]) -> Fingerprints:
    digests: list[bytes] = []
    thumbnails = [np.empty((0, SIDE, SIDE), np.float32)]
    if isinstance(images, np.ndarray) and images.shape[1:3] == (SIDE, SIDE):
        for start in range(0, len(images), BATCH):
            digests += map(_digest, images[start : start + BATCH])
            thumbnails.append(thumbnail_of(images[start : start + BATCH]))
    else:  # decoded one by one, to save memory
        for digest, thumbnail in map_in_threads(fingerprint, images, num_cores()):
            digests.append(digest)
            thumbnails.append(thumbnail[None])
    return Fingerprints(digests, np.concatenate(thumbnails))


def fingerprint(image: Array) -> tuple[bytes, Array]:
    """Return the hash and the thumbnail [32, 32] of an image [H, W, 3]."""
    return _digest(image), thumbnail_of(image)


def thumbnail_of(image: Array) -> Array:
    """Brightness [32, 32], float32 0..255, of an image [H, W, 3]; all 0 if the image is too small to compare.

    Images [N, 32, 32, 3] give [N, 32, 32].
    """
    if image.shape[-3:-1] == (SIDE, SIDE):
        return image @ np.array(LUMA, np.float32)
    if min(image.shape[:2]) < MIN_SIDE:
        return np.zeros((SIDE, SIDE), np.float32)
    grey = Image.fromarray(image).convert("L")
    small = grey.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    return np.asarray(small, np.float32)


def perceptual_hashes(thumbnails: Array) -> Array:
    """Hash thumbnails [N, 32, 32] to uint64 [N]: a bit for each of the 63 lowest frequencies above their
    median."""
    basis = dct(np.eye(SIDE, dtype=np.float32), axis=0, norm="ortho")[:HASH_SIDE]
    low = (basis @ thumbnails @ basis.T).reshape(-1, HASH_SIDE**2)[:, 1:]
    above = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(np.pad(above, ((0, 0), (0, 1))), axis=1).view(np.uint64)[:, 0]


def _digest(image: Array) -> bytes:
    return hashlib.blake2b(b"%d %d " % image.shape[:2] + image.tobytes(), digest_size=32).digest()


def _exact_pairs(
    first: list[bytes], second: list[bytes], *, within: bool
) -> dict[tuple[int, int], None]:
    """List every pair of equal digests, in order; within one set, each pair once."""
    where: dict[bytes, list[int]] = {}
    for position, digest in enumerate(second):
        where.setdefault(digest, []).append(position)
    return {
        (a, b): None
        for a, digest in enumerate(first)
        for b in where.get(digest, ())
        if not within or a < b
    }


def _near_pairs(first: Array, second: Array, *, within: bool) -> dict[tuple[int, int], float]:
    """Find pairs with similar hashes and thumbnails, and the difference between the thumbnails."""
    # Leave out thumbnails without contrast, which resemble any other.
    contrasts = [each.std(axis=(1, 2)) for each in (first, second)]
    kept = [np.flatnonzero(contrast >= MIN_CONTRAST) for contrast in contrasts]
    first, second = first[kept[0]], second[kept[1]]
    hashes = perceptual_hashes(first), perceptual_hashes(second)
    standard = [
        _standardised(each, contrast[rows])
        for each, contrast, rows in zip((first, second), contrasts, kept, strict=True)
    ]
    near = {}
    for start in range(0, len(first), CHUNK):
        apart = np.bitwise_count(hashes[0][start : start + CHUNK, None] ^ hashes[1])
        rows, columns = np.divmod(np.flatnonzero(apart <= MAX_BITS), len(second))
        for a, b in zip((rows + start).tolist(), columns.tolist(), strict=True):
            pair = int(kept[0][a]), int(kept[1][b])
            if within and pair[0] >= pair[1]:
                continue
            difference = float(np.sqrt(np.mean((standard[0][a] - standard[1][b]) ** 2)))
            if difference <= MAX_DIFFERENCE:
                near[pair] = difference
    return near


def _standardised(thumbnails: Array, contrasts: Array) -> Array:
    """Scale thumbnails to mean 0 and standard deviation 1, [N, 1024]. contrasts [N]: their deviations."""
    flat = thumbnails.reshape(-1, SIDE**2)
    return (flat - flat.mean(axis=1, keepdims=True)) / contrasts[:, None]
