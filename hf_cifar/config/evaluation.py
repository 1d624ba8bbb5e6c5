"""Options of evaluation, comparison and report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_cifar.config.fields import check_fields, option, refuse_both_formats
from hf_cifar.config.model import refuse_precision_of_exported
from hf_cifar.config.objects import named
from hf_cifar.errors import UserError


@dataclass(frozen=True)
class EvaluateConfig:
    """Which saved model to evaluate, and on which split.

    In Python, `model_name_or_path` may be (model, image_processor), as in a `RunResult`.
    """

    _argument_group_name = "evaluation"

    model_name_or_path: str = option(
        "", "Folder of a run, a Hub id, or an exported .onnx file, of a fine-tuned model. Required."
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    split: Literal["validation", "test"] = option("validation", "Which split to evaluate.")
    output_dir: str | None = option(
        None, "Where to write metrics and predictions; default: the model's folder."
    )
    per_device_eval_batch_size: int = option(64, "Images per step and process.", low=1, high=2**20)
    dataloader_num_workers: int | None = option(
        None,
        "Loader processes; default: 0 for images in memory, else one per core.",
        low=0,
        high=1024,
    )
    bf16: bool = option(False, "Evaluate under bfloat16 autocast.")
    fp16: bool = option(False, "Evaluate under float16 autocast (GPU).")
    reject: float | None = option(
        None,
        "Share of the run's validation images to keep: fit thresholds that reject images, as finetune "
        "--reject does, and save them with the model; 0.95 if no value is given.",
        low=0.5, high=0.999, bare="0.95",
    )  # fmt: skip
    corruptions: int = option(
        0,
        "Also measure the accuracy under the fifteen common corruptions of CIFAR-10-C at five severities, on "
        "this many images (stratified), each of which is predicted 76 times; 0 for none.",
        low=0,
    )
    use_cpu: bool = option(False, "Evaluate on the CPU even if there is a GPU.")
    trust_remote_code: bool = option(
        False,
        "Run code that comes with the checkpoint; a Hub model needs a full commit as --model_revision.",
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "model_name_or_path", named(self.model_name_or_path))
        check_fields(self)
        refuse_both_formats(self)
        refuse_precision_of_exported(self)
        if self.reject is None:
            return
        if self.split == "test":
            raise UserError("--reject is fitted on validation; leave out --split test")
        if not self.writes_to_model:
            raise UserError("--reject changes the run in its own folder; leave out --output_dir")

    @property
    def writes_to_model(self) -> bool:
        """True if the metrics go to the model's own folder."""
        own = Path(self.model_name_or_path).resolve()
        return self.output_dir is None or Path(self.output_dir).resolve() == own


@dataclass(frozen=True)
class CompareConfig:
    """Which predictions of two runs to compare."""

    _argument_group_name = "comparison"

    split: Literal["auto", "validation", "test"] = option(
        "auto", "Split to compare; auto: test if both runs have its predictions, else validation."
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class ReportConfig:
    """Contents of a report."""

    _argument_group_name = "report"

    gallery_size: int = option(24, "Pictures in each gallery; 0 for none.", low=0)
    check_duplicates: bool = option(
        True, "Look for evaluated images that are in train too, exactly or nearly."
    )
    explain: int = option(
        0,
        "Most confident mistakes for which Grad-CAM shows where the model looked; needs the saved model.",
        low=0,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.explain > self.gallery_size:
            raise UserError(
                f"--explain is {self.explain}, and the report shows {self.gallery_size} mistakes; pass a "
                "larger --gallery_size"
            )
