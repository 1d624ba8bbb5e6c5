"""Model options, and what the names of models begin with."""

from __future__ import annotations

from dataclasses import dataclass

from hf_cifar.config.fields import option
from hf_cifar.errors import UserError

SCRATCH, BUNDLED = "scratch/", "bundled/"


@dataclass(frozen=True)
class ModelConfig:
    """Which pretrained model to start from."""

    _argument_group_name = "model"

    model_name_or_path: str = option(
        "google/vit-base-patch16-224-in21k",
        "Hub id (transformers or timm), local folder, bundled/efficientnet_lite0, or scratch/NAME "
        "(article_cnn, article_mlp, any timm architecture) for random weights.",
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    image_size: int | None = option(
        None, "Side of the square model input, in pixels; the checkpoint's own if not given."
    )
    freeze: str = option(
        "none",
        "What stays fixed: none, backbone (train the head alone), or N: train the head and the last N "
        "stages or blocks.",
    )
    trust_remote_code: bool = option(
        False,
        "Run code that comes with the checkpoint; of a Hub model, with a full commit as --model_revision.",
    )

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image_size is {self.image_size}; it must be at least 1 pixel")
        if self.freeze not in ("none", "backbone") and not self.freeze.isdigit():
            raise UserError(
                f"--freeze is {self.freeze!r}; it takes none, backbone, or a number of stages or blocks"
            )
