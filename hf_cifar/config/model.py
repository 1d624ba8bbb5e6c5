"""Model options, and the prefixes of model names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hf_cifar.config.fields import check_fields, option
from hf_cifar.config.objects import named
from hf_cifar.errors import UserError

SCRATCH, BUNDLED = "scratch/", "bundled/"
EXPORTED = ".onnx"  # how an exported file ends


def is_exported(name: str) -> bool:
    """Return True for the name of an exported file rather than of a folder or a Hub model."""
    return name.lower().endswith(EXPORTED)


def refuse_precision_of_exported(config: Any) -> None:
    """Raises: UserError for --bf16 or --fp16 with an exported file."""
    for flag in ("bf16", "fp16"):
        if getattr(config, flag) and is_exported(config.model_name_or_path):
            raise UserError(
                f"--{flag} has no effect on {config.model_name_or_path}, which computes as it was exported; "
                "leave it out"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Which pretrained model to start from.

    In Python, `model_name_or_path` may be the model itself, or
    (model, image_processor), see `models.objects`.
    """

    _argument_group_name = "model"

    model_name_or_path: str = option(
        "google/vit-base-patch16-224-in21k",
        "Hub id (transformers or timm), local folder, bundled/efficientnet_lite0 (or 1, 2), or scratch/NAME "
        "(article_cnn, article_mlp, any timm architecture) for random weights.",
        public=False,
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    image_size: int | None = option(
        None, "Side of the square model input, in pixels; default: the checkpoint's own.", low=1
    )
    resize_mode: Literal["crop", "squash", "pad"] | None = option(
        None,
        "For images of another shape than the input: crop shows the centre, squash changes the aspect ratio, "
        "pad adds a border of the mean colour; default: as the checkpoint does.",
    )
    freeze: str = option(
        "none",
        "none: train all; backbone: train the head only; N: train the head and the last N stages or blocks.",
    )
    dropout: float | None = option(
        None,
        "Dropout probability, before the head or in the layers, if the model has dropout; default: the "
        "checkpoint's own.",
        low=0, high=0.99,
    )  # fmt: skip
    drop_path: float | None = option(
        None,
        "Stochastic depth: drop probability of the last layer, if the model has it; default: the "
        "checkpoint's own.",
        low=0, high=0.99,
    )  # fmt: skip
    lora_rank: int = option(
        0,
        "LoRA: train adapters of this rank, for example 8, and the head, instead of all weights; the run "
        "saves the merged model, and the adapter in adapter/. 0 turns it off.",
        low=0, high=4096,
    )  # fmt: skip
    grow_head: bool = option(
        False,
        "Instead of a new head, keep the checkpoint's head for the classes that it knows, matched by name, "
        "and append the other classes of the data; hf-cifar update does so.",
    )
    trust_remote_code: bool = option(
        False,
        "Run code that comes with the checkpoint; a Hub model needs a full commit as --model_revision.",
        may_change=True,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_name_or_path", named(self.model_name_or_path))
        check_fields(self)
        if self.freeze not in ("none", "backbone") and not self.freeze.isdigit():
            raise UserError(
                f"--freeze is {self.freeze!r}; it takes none, backbone, or a number of stages or blocks"
            )
        if self.grow_head and self.model_name_or_path.startswith((SCRATCH, BUNDLED)):
            raise UserError(
                f"--grow_head keeps the classes of a fine-tuned model, and {self.model_name_or_path} is not "
                "fine-tuned; pass the folder of a run"
            )
        if self.lora_rank and self.freeze != "none":
            raise UserError(
                f"--lora_rank already freezes the backbone; leave out --freeze {self.freeze}"
            )
        if self.lora_rank and self.model_name_or_path.startswith(SCRATCH):
            raise UserError(
                f"--lora_rank adapts a pretrained model, and {self.model_name_or_path} has random weights; "
                "leave it out"
            )
