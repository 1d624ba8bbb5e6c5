"""A checkpoint's image processor as one batched tensor function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend

from hf_cifar.errors import UserError
from hf_cifar.transforms.resampling import KERNELS, Levels, whole_image
from hf_cifar.transforms.resizing import LIBRARIES, resize_exactly

MAX_CANVAS = 2**27  # pixels of an image with its border

# Training images are stored this much larger than the model's input, as a margin for random crops.
TRAINING_MARGIN = 8 / 7
# The transformers processor that adds a border of the mean colour.
PADS_TO_SQUARE = "LlavaImageProcessor"
# Pillow's numbers for its filters, which transformers saves as `resample`.
RESAMPLE_NAMES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop and normalise, as read from an image processor.

    resize: (height, width) in pixels, or the length of the shorter side, which keeps the aspect ratio; None
    keeps the size. crop: (height, width) of the central crop, or None. mean, std: per channel, of pixels
    times `rescale_factor`. border: the colour of pixels added around an image to give it the shape of
    `resize`, with the image in the middle; None resizes without one.
    """

    resize: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    library: str = "pillow"  # used for resizing: "pillow" or "torchvision"
    crop_rounds_down: bool = False  # when cropping an odd number of pixels; else half to even
    # A crop of the crop that is still to come, see `uncropped`.
    inner_crop: tuple[int, int] | None = None
    border: tuple[int, ...] | None = None
    border_first: bool = False  # before resizing; else after it

    def __post_init__(self) -> None:
        if self.interpolation not in KERNELS:
            raise UserError(
                f"the checkpoint resizes with {self.interpolation!r}; supported are {sorted(KERNELS)}"
            )
        if not (len(self.mean) == len(self.std) == 3 and all(map(math.isfinite, self.mean))):
            raise UserError(
                f"the checkpoint's mean is {self.mean}; it must be three finite numbers"
            )
        scales = (*self.std, self.rescale_factor)
        if not all(0 < scale < math.inf for scale in scales):
            raise UserError(
                f"the checkpoint's standard deviations are {self.std} and its rescale factor "
                f"{self.rescale_factor}; they must be positive"
            )

    @classmethod
    def from_image_processor(cls, processor) -> Preprocessing:
        """Read the geometry and statistics of a transformers or timm image processor.

        Raises: UserError for a processor that this class cannot reproduce.
        """
        if hasattr(processor, "preprocessing"):  # of an exported file, see models/exported.py
            return processor.preprocessing
        if hasattr(processor, "data_config"):  # TimmWrapperImageProcessor
            return cls._from_timm(processor.data_config)
        return cls._from_transformers(processor)

    @classmethod
    def _from_timm(cls, config: dict) -> Preprocessing:
        height, width = config["input_size"][-2:]
        # timm.data.transforms_factory.transforms_imagenet_eval
        tall, wide = (int(np.floor(side / config["crop_pct"])) for side in (height, width))
        mode = config.get("crop_mode", "center")
        if mode not in ("center", "squash", "border"):
            raise UserError(
                f"the checkpoint crops with mode {mode!r}; only center, squash and border are supported"
            )
        if mode == "border" and config["crop_pct"] != 1:
            raise UserError(
                f"the checkpoint adds a border and crops to {config['crop_pct']:g} of the result; only one "
                "of them is supported"
            )
        if mode == "center" and height != width:
            raise UserError(
                f"the checkpoint crops to {height} x {width} pixels; only square crops are supported"
            )
        resize = tall if mode == "center" else (tall, wide)
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if mode == "border":
            border = tuple(round(255 * value) for value in mean)
            return cls(resize, None, config["interpolation"], mean, std, border=border)
        return cls(resize, (height, width), config["interpolation"], mean, std)

    @classmethod
    def _from_transformers(cls, processor) -> Preprocessing:
        options = processor.to_dict()
        for unknown in ("do_flip_channel_order", "rescale_offset"):
            if options.get(unknown):
                raise UserError(
                    f"the checkpoint's image processor sets {unknown}, which is not supported"
                )
        pads = bool(options.get("do_pad"))
        if pads and not str(options.get("image_processor_type")).startswith(PADS_TO_SQUARE):
            raise UserError("the checkpoint's image processor sets do_pad, which is not supported")
        size = options.get("size") or {}
        crop = None
        if options.get("do_center_crop"):
            side = options["crop_size"]
            crop = (side["height"], side["width"])
        if not options.get("do_resize", True):
            resize = None
        elif "shortest_edge" in size and "longest_edge" not in size:
            resize = size["shortest_edge"]
            if options.get("crop_pct") is not None:  # ConvNextImageProcessor
                side, resize = resize, int(resize / options["crop_pct"])
                crop = (side, side) if side < 384 else None
                resize = resize if side < 384 else (side, side)
        elif "height" in size:
            resize = (size["height"], size["width"])
        else:
            raise UserError(
                f"the checkpoint's image processor resizes by {size}, which is not supported"
            )
        do_normalize = options.get("do_normalize", True)
        mean = tuple(options["image_mean"]) if do_normalize else (0.0, 0.0, 0.0)
        std = tuple(options["image_std"]) if do_normalize else (1.0, 1.0, 1.0)
        if options.get("include_top"):  # EfficientNetImageProcessor divides by the deviation twice
            std = tuple(value**2 for value in std)
        rescale_factor = (
            options.get("rescale_factor", 1 / 255) if options.get("do_rescale", True) else 1.0
        )
        resample_code = options.get("resample")
        interpolation = RESAMPLE_NAMES[2 if resample_code is None else int(resample_code)]
        library = "torchvision" if isinstance(processor, TorchvisionBackend) else "pillow"
        border = tuple(int(255 * value) for value in options["image_mean"]) if pads else None
        if pads and isinstance(resize, int):
            resize = (resize, resize)
        return cls(
            resize, crop, interpolation, mean, std, rescale_factor, library, crop_rounds_down=True,
            border=border, border_first=pads,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Preprocessing:
        """Restore what `to_dict` returned. Raises: TypeError for other names."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in saved.items()
        }
        return cls(**values)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the model's input, in pixels.

        Raises: UserError if it depends on the image.
        """
        final = self.crop or self.resize
        if not isinstance(final, tuple):
            raise UserError(
                "the checkpoint's image processor has no fixed output size; pass --image_size"
            )
        return final

    @property
    def resize_mode(self) -> str:
        """How an image of another shape than the input is resized: crop, squash or pad."""
        if self.border is not None:
            return "pad"
        return "crop" if isinstance(self.resize, int) else "squash"

    def stored(self, *, augmented: bool) -> Preprocessing:
        """Return the view in which images are stored: for training enlarged, for evaluation without the crop.

        Enlarged images are resized by torch, the faster library, because no image processor makes them. The
        statistics do not matter: models that differ in nothing else share the stored images.
        """
        plain = replace(self, mean=(0.0,) * 3, std=(1.0,) * 3, rescale_factor=1.0)
        if not augmented:
            return plain.uncropped()
        library = "torchvision" if ("torchvision", self.interpolation) in LIBRARIES else "pillow"
        return replace(plain.enlarged(TRAINING_MARGIN), library=library)

    def enlarged(self, factor: float) -> Preprocessing:
        """The same view of an image with `factor` times as many pixels per side."""

        def scaled(value):
            if value is None:
                return None
            return (
                round(value * factor)
                if isinstance(value, int)
                else tuple(round(v * factor) for v in value)
            )

        return replace(self, resize=scaled(self.resize), crop=scaled(self.crop))

    def uncropped(self) -> Preprocessing:
        """The same resizing without the crop: applying `view` to its result equals `view` of the image."""
        if self.crop is None or self.resize is None:
            return self
        if isinstance(self.resize, tuple):
            return replace(self, crop=None)
        height, width = self.crop
        crop = (max(self.resize, height), max(self.resize, width))
        return replace(self, crop=crop, inner_crop=self.crop)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a height x width image after resizing, before the crop."""
        if self.resize is None:
            return height, width
        if isinstance(self.resize, int):
            # The shorter side becomes `resize`, the longer one is rounded down, as torchvision does.
            short, long = sorted((height, width))
            longer = int(self.resize * long / short)
            return (self.resize, longer) if height <= width else (longer, self.resize)
        return self.resize

    def corner(self, resized: tuple[int, int]) -> tuple[int, int]:
        """(top, left) of the crop of a resized image, negative where the crop is larger."""
        crop = self.crop or resized
        inner = self.inner_crop or crop
        middle = math.floor if self.crop_rounds_down else round

        def start(axis: int) -> int:
            # The crop of the result must be that of the whole image, however halves are rounded.
            whole, later = resized[axis] - inner[axis], crop[axis] - inner[axis]
            return middle(whole / 2) - middle(later / 2)

        return start(0), start(1)

    def box(self, height: int, width: int) -> Tensor:
        """The box [1, 4] of a height x width image that the model sees: (top, left, bottom, right)."""
        resized = self.resized(height, width)
        crop = self.crop or resized
        top, left = self.corner(resized)
        rows, columns = height / resized[0], width / resized[1]
        return torch.tensor(
            [[top * rows, left * columns, (top + crop[0]) * rows, (left + crop[1]) * columns]],
            dtype=torch.float64,
        )

    def _is_unchanged(self, height: int, width: int) -> bool:
        """True if the model sees an image of this size unchanged."""
        return (height, width) == self.size and self.resize in (None, self.size, min(self.size))

    def view(self, images: Tensor) -> Tensor:
        """Resize and crop [N, C, H, W] uint8 to float [N, C, *size], whole numbers 0..255."""
        height, width = images.shape[-2:]
        if self._is_unchanged(height, width):
            return images.to(torch.float32)
        if self.border is not None and not self.border_first:
            return self._bordered(self._fitted(images), *self.size)
        if self.border is not None:
            images = self.shaped(images)
        box = self.box(*images.shape[-2:])
        return resize_exactly(images, box, self.size, self.interpolation, self.library)

    def view_image(self, image: np.ndarray) -> np.ndarray:
        """Apply `view` to one image [H, W, 3] uint8, giving uint8 [*size, 3], with the library itself: the
        same pixels, several times faster on one CPU core."""
        height, width = image.shape[:2]
        resized = self.resized(height, width)
        top, left = self.corner(resized)
        library = LIBRARIES.get((self.library, self.interpolation))
        # Of a long, narrow image, the library would resize the whole, and the crop keeps little of it.
        is_wasteful = math.prod(resized) > 4 * max(height * width, math.prod(self.size))
        if library is None or self.border is not None or min(top, left) < 0 or is_wasteful:
            view = self.view(torch.tensor(image).permute(2, 0, 1)[None])
            return view[0].permute(1, 2, 0).to(torch.uint8).numpy()
        if resized != (height, width):
            image = library(image, resized, self.interpolation)
        return np.ascontiguousarray(image[top : top + self.size[0], left : left + self.size[1]])

    def frame(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images with their border, if any, and the box [1, 4] that random views vary: what the
        crop keeps of images that are not square, else the whole image."""
        images = self.shaped(images)
        height, width = images.shape[-2:]
        if isinstance(self.resize, int) and height != width:
            return images, self.box(height, width)
        return images, whole_image(height, width)

    def shaped(self, images: Tensor) -> Tensor:
        """Add the border, if any, that gives images [N, C, H, W] the shape of the model's input."""
        if self.border is None or not isinstance(self.resize, tuple):
            return images
        (height, width), (tall, wide) = images.shape[-2:], self.resize
        return self._bordered(
            images, max(height, round(width * tall / wide)), max(width, round(height * wide / tall))
        )

    def _bordered(self, images: Tensor, height: int, width: int) -> Tensor:
        """Put images [N, C, H, W] in the middle of a canvas of the border's colour.

        Raises: UserError for a canvas of more pixels than any image may have.
        """
        if height * width > MAX_CANVAS:
            raise UserError(
                f"cannot read image: with its border, it would have {width:,} x {height:,} pixels; crop it"
            )
        top, left = (height - images.shape[-2]) // 2, (width - images.shape[-1]) // 2
        colour = torch.tensor(self.border, dtype=images.dtype).to(images.device).view(1, -1, 1, 1)
        canvas = colour.expand(*images.shape[:2], height, width).clone()
        canvas[..., top : top + images.shape[-2], left : left + images.shape[-1]] = images
        return canvas

    def _fitted(self, images: Tensor) -> Tensor:
        """Resize so that the whole image fits into the input, keeping its aspect ratio.

        Source: timm.data.transforms.ResizeKeepRatio.
        """
        height, width = images.shape[-2:]
        ratio = max(height / self.size[0], width / self.size[1])
        fitted = (max(1, round(height / ratio)), max(1, round(width / ratio)))
        box = whole_image(height, width)
        return resize_exactly(images, box, fitted, self.interpolation, self.library)

    def view_each(self, images: Sequence[np.ndarray], device: torch.device) -> Tensor:
        """Apply `view` to images [H, W, 3] uint8 of any sizes, batched by size: [N, 3, *size]."""

        def same_size(images: Sequence[np.ndarray]) -> Tensor:
            batch = torch.from_numpy(np.stack(images)).to(device)
            return self.view(batch.permute(0, 3, 1, 2))

        rows_of_size: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(images):
            rows_of_size.setdefault(image.shape, []).append(row)
        if len(rows_of_size) == 1:
            return same_size(images)
        views = torch.empty((len(images), 3, *self.size), device=device)
        for rows in rows_of_size.values():
            views[rows] = same_size([images[row] for row in rows])
        return views

    def levels(self, device: torch.device) -> Levels:
        """The map from pixel values 0..255 to model inputs."""
        mean = torch.tensor(self.mean).to(device, non_blocking=True)
        std = torch.tensor(self.std).to(device, non_blocking=True)
        return Levels.normalizing(mean, std, self.rescale_factor)

    def normalize(self, images: Tensor) -> Tensor:
        """Map float pixels 0..255 to the model's `pixel_values`."""
        return self.levels(images.device)(images)

    def __call__(
        self, images: Tensor, memory_format: torch.memory_format = torch.contiguous_format
    ) -> Tensor:
        """Compute `pixel_values` [N, C, *size] for evaluation from uint8 [N, C, H, W]."""
        return self.normalize(self.view(images)).contiguous(memory_format=memory_format)
