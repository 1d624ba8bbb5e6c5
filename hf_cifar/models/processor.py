"""Image processors: the checkpoint's own, set to the training size and without cropping."""

from __future__ import annotations

from typing import Any

from transformers import BaseImageProcessor, PreTrainedConfig, ViTImageProcessor


def timm_processor(config: PreTrainedConfig, size: int) -> BaseImageProcessor:
    """Write `size` into a timm model's config, which holds its preprocessing, and return the processor."""
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import (
        TimmWrapperImageProcessor,
    )

    config.model_args = config.model_args or {}  # timm rejects a null in a local folder's config
    config.pretrained_cfg = {
        **config.pretrained_cfg,
        "input_size": [3, size, size],
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    return TimmWrapperImageProcessor(
        pretrained_cfg=config.pretrained_cfg, architecture=config.architecture
    )


def transformers_processor(processor: BaseImageProcessor, size: int) -> BaseImageProcessor:
    """Copy a processor with its size set to `size`, without the crop that would remove the border."""
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


def plain_processor(size: int) -> BaseImageProcessor:
    """Make a processor that resizes to `size` and divides by 255, for networks trained from scratch."""
    return ViTImageProcessor(
        size={"height": size, "width": size},
        resample=3,
        image_mean=[0.0, 0.0, 0.0],
        image_std=[1.0, 1.0, 1.0],
    )
