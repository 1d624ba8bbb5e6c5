"""Photographs to measure with: JPEG files of random scenes with detail, in one folder per class.

python -m benchmarks.pictures FOLDER [--images 20000] [--classes 100]
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

CANVAS = 1024  # px per side of the scene that pictures are cut from
QUALITY = 90


def scene(seed: int) -> Image.Image:
    """Return a picture with structure at all scales, like a photograph: octaves of noise, the coarse ones
    strongest."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((CANVAS, CANVAS, 3), np.float32)
    for side in (4, 16, 64, 256, 1024):
        noise = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        octave = Image.fromarray(noise).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
        pixels += (np.asarray(octave, np.float32) - 128) * {
            4: 1.0,
            16: 0.6,
            64: 0.4,
            256: 0.2,
            1024: 0.08,
        }[side]
    return Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8))


def photograph(scenes: list[Image.Image], number: int, low: int, high: int) -> Image.Image:
    """Crop a picture of low..high px per side from a random scene, at a random place."""
    generator = np.random.default_rng(number)
    width, height = generator.integers(low, high + 1, 2).tolist()
    left, top = generator.integers(0, CANVAS - max(width, height) + 1, 2).tolist()
    chosen = scenes[int(generator.integers(len(scenes)))]
    return chosen.crop((left, top, left + width, top + height))


def _write(folder: str, numbers: range, num_classes: int, low: int, high: int) -> None:
    scenes = [scene(seed) for seed in range(8)]
    for number in numbers:
        path = Path(folder, f"class{number % num_classes:04d}", f"{number:06d}.jpg")
        photograph(scenes, number, low, high).save(path, quality=QUALITY)


def write_photographs(
    folder: Path, num_images: int = 20_000, num_classes: int = 100, low: int = 400, high: int = 500
) -> Path:
    """Write JPEG files of low..high px per side, evenly into the class folders, on all cores."""
    for number in range(num_classes):
        (folder / f"class{number:04d}").mkdir(parents=True, exist_ok=True)
    parts = [range(i, min(i + 500, num_images)) for i in range(0, num_images, 500)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        done = [pool.submit(_write, str(folder), part, num_classes, low, high) for part in parts]
        for each in done:
            each.result()
    return folder


def main() -> None:
    """Write a folder of photographs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--low", type=int, default=400)
    parser.add_argument("--high", type=int, default=500)
    options = parser.parse_args()
    write_photographs(options.folder, options.images, options.classes, options.low, options.high)


if __name__ == "__main__":
    main()
