"""Preparing the images of splits for a model: where they are kept, and what becomes of unreadable ones."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace

import numpy as np
import psutil
import torch

from hf_cifar.data.cache import cache_folder, free_bytes
from hf_cifar.data.pixels import OtherSize, Prepared
from hf_cifar.data.split import Split, UnreadableImages, render_rows, subset
from hf_cifar.errors import UserError
from hf_cifar.text import duration
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
# Share of the free memory that resident images may take, and the most bytes of one split on a CPU: the system
# keeps recently read files in free memory, so that more gains nothing.
MEMORY_SHARE, MEMORY_LIMIT = 0.25, 1024**3
# Share of the free disk that prepared images may take.
DISK_SHARE = 0.5
# Share of a device's free memory that the images of one split may take.
DEVICE_SHARE = 0.25
# Work of at least this many seconds is announced.
SECONDS_ANNOUNCED = 3
CPU = torch.device("cpu")


def memory_to_spare() -> int:
    """Bytes of memory that this process may use for the images of a split."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    spare = psutil.virtual_memory().available * MEMORY_SHARE / processes
    return int(min(spare, MEMORY_LIMIT))


def fits_in_memory(num_bytes: int, device: torch.device = CPU) -> bool:
    """True if images of this size may be kept on the device, or in memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if num_bytes < DEVICE_SHARE * free:
            return True
    return num_bytes <= memory_to_spare()


class SplitImages:
    """The images of a split in the form that a model needs, and where they are kept during training.

    augmented: for training, with a margin for random crops. kind: auto, resident, disk or streamed; never
    auto once chosen. lazy: images are prepared when their turn comes, not in a pass before.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        *,
        augmented: bool,
        kind: str = "auto",
        lazy: bool = False,
        device: torch.device = CPU,
    ) -> None:
        self.split, self.preprocessing, self.augmented = split, preprocessing, augmented
        self.lazy, self.device = lazy, device
        self.prepared, self.kind = self._choose(kind)

    def _choose(self, kind: str) -> tuple[Prepared, str]:
        pixels = self.split.pixels
        form = pixels.form(self.preprocessing, augmented=self.augmented, exact_size=not self.lazy)
        prepared = pixels.prepared(form, stores=kind != "streamed")
        if kind != "auto":
            return prepared, kind
        if fits_in_memory(len(self.split) * form.row_bytes, self.device) and not self.lazy:
            return prepared, "resident"
        if prepared.num_bytes(self.split.positions) < DISK_SHARE * free_bytes(cache_folder()):
            return prepared, "disk"
        return pixels.prepared(form, stores=False), "streamed"

    def __len__(self) -> int:
        return len(self.split)

    @property
    def decodes(self) -> bool:
        """True if images are decoded while the model computes."""
        return self.kind == "streamed" or self.lazy

    @property
    def seconds(self) -> float:
        """Estimate of the time to prepare the images that are missing."""
        return self.prepared.seconds(self.split.positions)

    def prepare(self) -> None:
        """Prepare all images that are missing, and announce work that takes more than a few seconds."""
        seconds = self.seconds
        if seconds > SECONDS_ANNOUNCED:
            num_bytes = self.prepared.num_bytes(self.split.positions)
            space = f" and {gigabytes(num_bytes)} in {cache_folder()}" if num_bytes else ""
            logger.info(
                "%s: preparing %s takes about %s%s", self.split.name, self, duration(seconds), space
            )
        try:
            self.prepared.prepare(self.split.positions, f"preparing {self.split.name}")
        except OtherSize:
            self.split.pixels.reject(self.prepared.form)
            self.prepared, self.kind = self._choose(self.kind)
            self.prepare()

    @property
    def faults(self) -> dict[int, str]:
        """Map the position of each image that is known to be unreadable to the reason."""
        return self.split.faults_at(self.prepared.unreadable(self.split.positions))

    @property
    def pixel_hash(self) -> str | None:
        """See `Prepared.pixel_hash`."""
        return self.prepared.pixel_hash(self.split.positions)

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the images [B, height, width, 3] uint8 and a mask [B] of the readable ones."""
        return self.prepared.read(self.split.positions[positions])

    def __str__(self) -> str:
        height, width = self.prepared.form.size
        return f"{len(self):,} images of {width} x {height} px"


def gigabytes(num_bytes: int) -> str:
    """Format a number of bytes: `2.3 GB`, `14 MB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{math.ceil(num_bytes / 1e6)} MB"


def readable(images: SplitImages, on_bad_image: str) -> Split:
    """Prepare the images of a split; returns it without the unreadable ones.

    Raises: UnreadableImages unless `on_bad_image` is skip; UserError if no image can be read.
    """
    split = images.split
    images.prepare()
    faults = images.faults
    if not faults:
        return split
    if on_bad_image != "skip":
        raise UnreadableImages([(split, faults)])
    bad = np.array(list(faults))
    kept = np.setdiff1d(np.arange(len(split)), bad)
    if not len(kept):
        raise UserError(f"no image of {split.name} can be read: {next(iter(faults.values()))}")
    logger.warning(
        "%s: %s of %s images cannot be read and are left out, %s",
        split.name, f"{len(bad):,}", f"{len(split):,}", render_rows([(split, faults)]),
    )  # fmt: skip
    return replace(subset(split, kept), skipped=split.row_ids[bad])
