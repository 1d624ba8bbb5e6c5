"""The images of a split as a model needs them: their form, where they are kept, and the pass that makes
them."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import psutil

from hf_cifar.data.cache import cache_folder, free_bytes
from hf_cifar.data.pixels import OtherSize, Pixels, Prepared
from hf_cifar.text import duration

if TYPE_CHECKING:  # mistakes in data are found without importing torch
    import torch

    from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
# Share of the free memory that resident images may take, and the most bytes of one split on a CPU: the system
# keeps recently read files in free memory, so more would gain nothing.
MEMORY_SHARE, MEMORY_LIMIT = 0.25, 1024**3
# Share of the free disk that prepared images may take.
DISK_SHARE = 0.5
# Share of a device's free memory that the images of one split may take.
DEVICE_SHARE = 0.25
# Work of at least this many seconds is announced.
SECONDS_ANNOUNCED = 3

Result = TypeVar("Result")


def memory_to_spare() -> int:
    """Bytes of memory that this process may use for the images of a split."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    spare = psutil.virtual_memory().available * MEMORY_SHARE / processes
    return int(min(spare, MEMORY_LIMIT))


def fits_in_memory(num_bytes: int, device: torch.device | None = None) -> bool:
    """True if images of this size may be kept on the device, or in memory."""
    return fits_on_gpu(num_bytes, device) or num_bytes <= memory_to_spare()


def fits_on_gpu(num_bytes: int, device: torch.device | None) -> bool:
    """True if images of this size may be kept on the device, and it is a GPU."""
    if device is None or device.type != "cuda":
        return False
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return num_bytes < DEVICE_SHARE * free


class SplitImages:
    """The images of a split in the form that a model needs, and where they are kept during training.

    positions: [N] of the split's images in `pixels`. augmented: for training, with a margin for random crops.
    kind: auto, resident, disk or streamed; the attribute is never auto. lazy: images are prepared when their
    turn comes, not in a pass before.
    """

    def __init__(
        self,
        name: str,
        pixels: Pixels,
        positions: np.ndarray,
        preprocessing: Preprocessing,
        *,
        augmented: bool,
        kind: str = "auto",
        lazy: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.name, self.pixels, self.positions = name, pixels, positions
        self.preprocessing, self.augmented = preprocessing, augmented
        self.lazy, self.device = lazy, device
        self.tensors: dict[Hashable, torch.Tensor] = {}  # made from the images, see `store`
        self._requested = kind
        self.prepared, self.kind = self._choose()

    def _choose(self) -> tuple[Prepared, str]:
        pixels, kind = self.pixels, self._requested
        form = pixels.form(self.preprocessing, augmented=self.augmented, exact_size=not self.lazy)
        prepared = pixels.prepared(form, stores=kind != "streamed")
        if kind != "auto":
            return prepared, kind
        if fits_in_memory(len(self.positions) * form.row_bytes, self.device) and not self.lazy:
            return prepared, "resident"
        if prepared.num_bytes(self.positions) < DISK_SHARE * free_bytes(cache_folder()):
            return prepared, "disk"
        return pixels.prepared(form, stores=False), "streamed"

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def decodes(self) -> bool:
        """True if images are decoded while the model computes."""
        return self.kind == "streamed" or self.lazy

    @property
    def seconds(self) -> float:
        """Estimate of the time to prepare the images that are missing."""
        return self._of_any_size(lambda: self.prepared.seconds(self.positions))

    def prepare(self) -> None:
        """Prepare all images that are missing, and announce work that takes more than a few seconds."""
        seconds = self.seconds
        if seconds > SECONDS_ANNOUNCED:
            took = duration(seconds)
            logger.info("%s: preparing %s takes about %s%s", self.name, self, took, self.space())
        what = f"preparing {self.name}"
        self._of_any_size(lambda: self.prepared.prepare(self.positions, what))

    def _of_any_size(self, work: Callable[[], Result]) -> Result:
        """Do the work; if an image has another size, choose a form for images of any size and repeat it."""
        try:
            return work()
        except OtherSize:
            self.pixels.reject(self.prepared.form)
            self.prepared, self.kind = self._choose()
            return work()

    @property
    def faults(self) -> dict[int, str]:
        """Map the position of each image that is known to be unreadable to the reason."""
        unreadable = self.prepared.unreadable(self.positions)
        found = (
            np.flatnonzero(np.isin(self.positions, list(unreadable))).tolist() if unreadable else []
        )
        return {number: unreadable[int(self.positions[number])] for number in found}

    @property
    def pixel_hash(self) -> str | None:
        """See `Prepared.pixel_hash`."""
        return self.prepared.pixel_hash(self.positions)

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the images [B, height, width, 3] uint8 and a mask [B] of the readable ones."""
        return self.prepared.read(self.positions[positions])

    def select(self, positions: np.ndarray) -> SplitImages:
        """Return some of the images, by position."""
        part = copy.copy(self)
        part.positions, part.tensors = self.positions[positions], {}
        return part

    def space(self) -> str:
        """Describe the disk space that missing images will take: ` and 2.3 GB in FOLDER`, or nothing."""
        num_bytes = self.prepared.num_bytes(self.positions)
        return f" and {gigabytes(num_bytes)} in {cache_folder()}" if num_bytes else ""

    def __str__(self) -> str:
        height, width = self.prepared.form.size
        return f"{len(self):,} images of {width} x {height} px"


def gigabytes(num_bytes: int) -> str:
    """Format a number of bytes: `2.3 GB`, `14 MB`."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{math.ceil(num_bytes / 1e6)} MB"
