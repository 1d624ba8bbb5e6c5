"""Options of prediction, export, push, pruning, quantisation and compression."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_cifar.config.data import MAX_IMAGE_PIXELS, PILLOW_PIXELS
from hf_cifar.config.fields import check_fields, option, refuse_both_formats
from hf_cifar.config.model import refuse_precision_of_exported
from hf_cifar.config.objects import named
from hf_cifar.errors import UserError


@dataclass(frozen=True)
class PredictConfig:
    """Which saved model to classify with, and how.

    In Python, `model_name_or_path` may be (model, image_processor), as in a `RunResult`.
    """

    _argument_group_name = "prediction"

    model_name_or_path: str = option(
        "", "Folder of a run, a Hub id, or an exported .onnx file, of a fine-tuned model. Required."
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
        refuse_precision_of_exported(self)


MOVED_DATA = "Where the run's data is now, if it has moved; default: where the run read it."


@dataclass(frozen=True)
class BatchPredictionConfig:
    """Which data set to classify as a whole, and where the table of predictions goes."""

    _argument_group_name = "batch prediction"

    dataset_name: str | None = option(
        None,
        "Classify a data set of any size into --output, instead of files: a folder or archive of images, "
        "Parquet files, a saved data set or a Hub id; labels are not needed.",
    )
    dataset_config_name: str | None = option(
        None, "Configuration of a data set that has more than one."
    )
    image_column_name: str | None = option(
        None, "Image column; default: found by its type or name."
    )
    split: str | None = option(None, "Split to classify; default: all, one after another.")
    output: str | None = option(
        None,
        "Folder for the predictions, in Parquet files of 1,000 rows. Repeat the command to continue, in "
        "multiple processes at once if wanted.",
    )
    shard: str | None = option(
        None,
        "i/N, i from 0: classify the i-th of N equal shares. Processes of accelerate launch divide the "
        "share further.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dataset_name is None:
            given = [name for name, value in vars(self).items() if value is not None]
            if given:
                raise UserError(
                    f"--{given[0]} is for a data set; pass --dataset_name too, or leave it out"
                )
        elif self.output is None:
            raise UserError("--output is missing; pass a folder for the predictions")
        _ = self.share

    @property
    def share(self) -> tuple[int, int]:
        """Return the number of the share and the number of shares, (0, 1) by default."""
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard or "0/1")
        index, count = map(int, match.groups()) if match else (0, 0)
        if index >= count:
            raise UserError(
                f"--shard is {self.shard}; pass i/N with i from 0 to N - 1, such as 0/4 to 3/4"
            )
        return index, count


# How the file of each format ends; a folder for a server has no ending.
SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "openvino": ".xml", "server": ""}


@dataclass(frozen=True)
class ExportConfig:
    """What to make of a run, and where."""

    _argument_group_name = "export"

    format: Literal["onnx", "torch_export", "openvino", "server"] = option(
        "onnx",
        "onnx: a file for ONNX Runtime and others; torch_export: a file for torch.export.load; openvino: an "
        ".xml file and its .bin; server: a folder with an ONNX file for Triton or OpenVINO Model Server.",
    )
    output: str = option(
        "", "File to write, ending with .onnx, .pt2 or .xml, or the folder for a server. Required."
    )
    with_preprocessing: bool = option(
        False,
        "Take uint8 images [N, H, W, 3] of any size; resizing and normalising are in the graph.",
    )
    parity_images: int = option(
        1000,
        "Compare the result with the model on up to this many images, at batch 1, 2, 7 and 64; 0: no "
        "comparison.",
        low=0,
    )
    dataset_name: str | None = option(
        None, "Folder of images to compare on; default: the run's own validation images."
    )
    overwrite: bool = option(False, "Replace an existing --output.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.output:
            raise UserError("--output is missing; pass the file or folder to write")
        suffix, found = SUFFIXES[self.format], Path(self.output).suffix.lower()
        if found != suffix and (suffix or found in SUFFIXES.values()):
            wanted = f"a file that ends with {suffix}" if suffix else "a folder, without an ending"
            raise UserError(
                f"--output is {self.output}, and --format {self.format} writes {wanted}; change one"
            )
        if self.format == "openvino" and self.with_preprocessing:
            raise UserError(
                "--with_preprocessing needs float64, which OpenVINO computes as float32; pass --format onnx, "
                "or leave out --with_preprocessing"
            )
        if self.dataset_name is not None and not self.parity_images:
            raise UserError(
                "--dataset_name has no effect with --parity_images 0, which compares nothing; leave one out"
            )


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
    handler: bool = option(
        False,
        "Write handler.py into the run and push it: with it, Hugging Face Inference Endpoints answers as "
        "hf-cifar predict does.",
    )

    def __post_init__(self) -> None:
        if not self.repo_id:
            raise UserError(
                "--repo_id is missing; pass the name of a repository, NAME or NAMESPACE/NAME"
            )


@dataclass(frozen=True)
class PruneConfig:
    """How much of a run's network to remove, and how to train the rest."""

    _argument_group_name = "prune"

    output_dir: str = option("", "Folder of the pruned run. Required.")
    target_size: float | None = option(
        None, "Largest share of the parameters to keep, for example 0.5.", low=0.01, high=0.99
    )
    target_latency: float | None = option(
        None,
        "Largest time of one image, as a share of the run's, measured on this machine, for example 0.7.",
        low=0.01, high=0.99,
    )  # fmt: skip
    num_train_epochs: float | None = option(
        None,
        "Epochs of fine-tuning after pruning; default: as many as the run had.",
        low=1e-6,
        high=1e6,
    )
    learning_rate: float | None = option(
        None,
        "Peak learning rate of fine-tuning; default: the run's if all its layers trained, else by "
        "optimiser and model family.",
        low=1e-12, high=1e3,
    )  # fmt: skip
    dataset_name: str | None = option(None, MOVED_DATA)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.output_dir:
            raise UserError("--output_dir is missing; pass the folder of the pruned run")
        if self.target_size is None and self.target_latency is None:
            raise UserError(
                "how much to prune is missing; pass --target_size or --target_latency, for example "
                "--target_size 0.5"
            )
        if self.target_size is not None and self.target_latency is not None:
            raise UserError("--target_size and --target_latency are both given; leave one out")


@dataclass(frozen=True)
class QuantizeConfig:
    """Where the 8-bit model goes, and how many images decide about it."""

    _argument_group_name = "quantize"

    output: str = option("", "File to write, ending with .onnx. Required.")
    calibration_images: int = option(
        300, "Training images that set the ranges of the activations.", low=1, high=10**5
    )
    judging_images: int = option(
        1000,
        "Validation images on which the answers are compared with the float model's.",
        low=1,
        high=10**6,
    )
    dataset_name: str | None = option(None, MOVED_DATA)
    overwrite: bool = option(False, "Replace an existing --output.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.output:
            raise UserError("--output is missing; pass the file to write, ending with .onnx")
        if Path(self.output).suffix.lower() != ".onnx":
            raise UserError(f"--output is {self.output}; pass a file that ends with .onnx")


@dataclass(frozen=True)
class CompressConfig:
    """Which smaller versions of a run to make, and where."""

    _argument_group_name = "compress"

    output_dir: str = option(
        "", "New folder for the versions and the page that compares them. Required."
    )
    candidates: list[str] | None = option(  # noqa: RUF009
        None, "Folders of other runs on the same data to compare with, such as a smaller network."
    )
    target_sizes: list[float] | None = option(  # noqa: RUF009
        None, "Shares of the parameters to prune to; default: 0.5.", low=0.01, high=0.99
    )
    num_train_epochs: float | None = option(
        None,
        "Epochs of fine-tuning after pruning; default: as many as the run had.",
        low=1e-6,
        high=1e6,
    )
    dataset_name: str | None = option(None, MOVED_DATA)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.output_dir:
            raise UserError("--output_dir is missing; pass a new folder")
