"""Image processors: the checkpoint's own, set to the training size and without cropping a margin.

A `mode` is a --resize_mode: crop, squash or pad; None is the checkpoint's own.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    BaseImageProcessor,
    BitImageProcessor,
    LlavaImageProcessor,
    PreTrainedConfig,
    ViTImageProcessor,
)

from hf_cifar.transforms.preprocessing import RESAMPLE_NAMES, Preprocessing

TIMM_MODES = {"crop": "center", "squash": "squash", "pad": "border"}


def timm_processor(
    config: PreTrainedConfig, size: int, mode: str | None = None
) -> BaseImageProcessor:
    """Write size and mode into a timm model's config, which holds its preprocessing; return the processor."""
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import (
        TimmWrapperImageProcessor,
    )

    config.model_args = config.model_args or {}  # timm rejects a null in a local folder's config
    config.pretrained_cfg = {
        **config.pretrained_cfg,
        "input_size": [3, size, size],
        "crop_pct": 1.0,
        "crop_mode": TIMM_MODES[mode]
        if mode is not None
        else config.pretrained_cfg.get("crop_mode", "center"),
    }
    return TimmWrapperImageProcessor(
        pretrained_cfg=config.pretrained_cfg, architecture=config.architecture
    )


def transformers_processor(
    processor: BaseImageProcessor, size: int, mode: str | None = None
) -> BaseImageProcessor:
    """Copy a processor with its size set to `size`, without the crop that would remove the border.

    For another mode than its own, return a processor of a type that supports it.
    """
    resized = _resized(processor, size)
    view = Preprocessing.from_image_processor(resized)
    return resized if mode in (None, view.resize_mode) else _processor_of(view, size, mode)


def _resized(processor: BaseImageProcessor, size: int) -> BaseImageProcessor:
    options = processor.to_dict()
    square = {"height": size, "width": size}
    changes: dict[str, Any] = {"do_resize": True}
    if "shortest_edge" in (options.get("size") or {}):
        changes["size"] = {"shortest_edge": size}
        if "crop_pct" in options:
            changes["crop_pct"] = 1.0
        else:
            changes |= {"do_center_crop": True, "crop_size": square}
    else:
        changes["size"] = square
        if "do_center_crop" in options:
            changes["do_center_crop"] = False
    return type(processor).from_dict({**options, **changes})


def _processor_of(view: Preprocessing, size: int, mode: str) -> BaseImageProcessor:
    """Make a processor with the statistics and the filter of `view`, and with this mode."""
    square = {"height": size, "width": size}
    factor = 255 * view.rescale_factor  # of pixels in 0..1
    options: dict[str, Any] = {
        "resample": next(
            code for code, name in RESAMPLE_NAMES.items() if name == view.interpolation
        ),
        "image_mean": [value / factor for value in view.mean],
        "image_std": [value / factor for value in view.std],
    }
    if mode == "crop":
        edge = {"shortest_edge": size}
        return BitImageProcessor(size=edge, do_center_crop=True, crop_size=square, **options)
    if mode == "pad":
        return LlavaImageProcessor(size=square, do_center_crop=False, do_pad=True, **options)
    return ViTImageProcessor(size=square, **options)


def plain_processor(size: int, mode: str | None = None) -> BaseImageProcessor:
    """Make a processor that resizes to `size` and divides by 255, for networks trained from scratch."""
    processor = ViTImageProcessor(
        size={"height": size, "width": size},
        resample=3,
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
    )
    return transformers_processor(processor, size, mode)
