"""Image files for the tests, and their expected pixels."""

import io

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
