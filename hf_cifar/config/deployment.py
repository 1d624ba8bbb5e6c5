"""Options of prediction and push."""

from __future__ import annotations

from dataclasses import dataclass

from hf_cifar.config.data import MAX_IMAGE_PIXELS, PILLOW_PIXELS
from hf_cifar.config.fields import check_fields, option, refuse_both_formats
from hf_cifar.config.objects import named
from hf_cifar.errors import UserError


@dataclass(frozen=True)
class PredictConfig:
    """Which saved model to classify with, and how.

    In Python, `model_name_or_path` may be (model, image_processor), as in a `RunResult`.
    """

    _argument_group_name = "prediction"

    model_name_or_path: str = option(
        "", "Folder of a run, or a Hub id, of a fine-tuned model. Required."
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    top_k: int = option(5, "Number of classes listed for each image.", low=1)
    batch_size: int = option(32, "Images per step of a thread.", low=1)
    bf16: bool = option(False, "Predict under bfloat16 autocast.")
    fp16: bool = option(False, "Predict under float16 autocast (GPU).")
    use_cpu: bool = option(False, "Predict on the CPU even if there is a GPU.")
    trust_remote_code: bool = option(
        False,
        "Run code that comes with the checkpoint; a Hub model needs a full commit as --model_revision.",
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "Images of more pixels count as unreadable, and are not decoded.",
        low=1,
        high=PILLOW_PIXELS,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_name_or_path", named(self.model_name_or_path))
        check_fields(self)
        refuse_both_formats(self)


@dataclass(frozen=True)
class PushConfig:
    """Where on the Hub a finished run goes."""

    _argument_group_name = "push"

    repo_id: str = option(
        "", "Repository, NAME or NAMESPACE/NAME; created if it does not exist. Required."
    )
    dry_run: bool = option(
        False, "Check everything and list what would be uploaded; upload nothing."
    )
    private: bool = option(True, "Make a new repository private; an existing one stays as it is.")
    revision: str | None = option(
        None, "Branch to push to, created from main if it does not exist; default: main."
    )

    def __post_init__(self) -> None:
        if not self.repo_id:
            raise UserError(
                "--repo_id is missing; pass the name of a repository, NAME or NAMESPACE/NAME"
            )
