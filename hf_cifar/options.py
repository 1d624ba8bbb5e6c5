"""Data, augmentation and model options, and how a command line is read. Imports no torch."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from hf_cifar.errors import UserError
from hf_cifar.text import nearest_hint, one_line

CONFIG_FILE = "config.yaml"  # the resolved options in a run's folder
RUN_FILE = "run.json"  # what happened in it
METRICS_FILE = "metrics.json"  # the figures of its splits
MAX_IMAGE_PIXELS = 8192 * 8192
PILLOW_PIXELS = 178_956_970  # above, Pillow opens no file


def option(default: Any, text: str) -> Any:
    """A dataclass field with its default and the text that `--help` and README show."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class DataConfig:
    """Which images and labels to use, and how they are split."""

    _argument_group_name = "data"

    dataset_name: str = option(
        "uoft-cs/cifar10",
        "Hub id, local folder (Hub layout, save_to_disk, or images in class folders), CIFAR archive, "
        "or bundled/digits.",
    )
    dataset_config_name: str | None = option(
        None, "Configuration of the data set, where it has several."
    )
    image_column_name: str | None = option(None, "Image column; found by its type if not given.")
    label_column_name: str | None = option(
        None,
        "Label column; found by its type if not given. May hold class labels, strings or integers, or lists "
        "of class labels or strings where an image has several.",
    )
    train_val_split: float = option(
        0.1,
        "Share of train that becomes validation, stratified (not of a stream), if the data has no validation "
        "split.",
    )
    split_seed: int = option(42, "Seed of the train/validation split and of every subsample.")
    max_train_samples: int | None = option(
        None,
        "Use at most this many training images, stratified; of a stream, a share of about as many.",
    )
    max_eval_samples: int | None = option(
        None,
        "Use at most this many validation (or test) images, stratified; of a stream, the first.",
    )

    streaming: bool = option(
        False,
        "Read train shard by shard as training goes, for data that is larger than the disk.",
    )
    pixel_store: Literal["auto", "resident", "streamed"] = option(
        "auto",
        "Where decoded images live: resident in memory, or streamed by loader processes; auto goes by "
        "their size and the free memory.",
    )
    on_bad_image: Literal["error", "skip"] = option(
        "error",
        "What images that cannot be read do: stop the run before its first step, with every row named, or "
        "stay out of it, as the model card then says.",
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "An image of more pixels cannot be read: it is refused before it is decoded.",
    )

    def __post_init__(self) -> None:
        if not 0 < self.train_val_split < 1:
            raise UserError(
                f"--train_val_split is {self.train_val_split}; it must lie between 0 and 1, for example 0.1"
            )
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}; it must be at least 1")
        if self.streaming and self.pixel_store == "resident":
            raise UserError("--streaming and --pixel_store resident exclude each other")
        if self.streaming and self.on_bad_image == "skip":
            raise UserError(
                "--on_bad_image skip does not go with --streaming: nobody could say which rows it left out; "
                "leave one of them out"
            )
        _check_max_image_pixels(self.max_image_pixels)


@dataclass(frozen=True)
class AugmentConfig:
    """Random transforms of a training batch; each image draws its own."""

    _argument_group_name = "augmentation"

    crop_padding: float = option(
        0.03125,
        "Largest random shift, as a share of the image side (0.03125 of 32 px is 1 px, for a few epochs; "
        "0.125 is usual in long runs).",
    )
    crop_scale: float = option(
        1.0, "Smallest share of the image area that a random resized crop keeps; 1 turns it off."
    )
    crop_ratio: float = option(
        4 / 3, "Largest aspect ratio of a random resized crop; the smallest is its inverse."
    )
    flip: float = option(0.5, "Probability of a horizontal flip.")
    rotation: float = option(0.0, "Largest random rotation, in degrees.")
    shear: float = option(0.0, "Largest random shear, in pixels per row or column.")
    zoom: float = option(0.0, "Largest random zoom in or out, as a share of the size.")
    color_jitter: float = option(
        0.0, "Brightness, contrast and saturation each change by up to this share."
    )
    hue: float = option(0.0, "Largest random turn of the colours; 0.5 is the opposite colour.")
    grayscale: float = option(0.0, "Probability of an image without colours.")
    auto_augment: Literal["none", "trivial_augment", "rand_augment"] = option(
        "none", "Policy that draws among 14 operations of colour and geometry for each image."
    )
    rand_augment_ops: int = option(2, "Operations that rand_augment applies to an image.")
    rand_augment_magnitude: float = option(9, "Mean strength of rand_augment, 0 to 30.")
    random_erasing: float = option(
        0.0, "Probability that a box of up to a third of the image is erased."
    )
    mixup_alpha: float = option(
        0.0, "Mixup: images are blended in pairs by Beta(alpha, alpha); 0 turns it off."
    )
    cutmix_alpha: float = option(
        0.0, "Cutmix: a box of another image, of area Beta(alpha, alpha); 0 turns it off."
    )

    def __post_init__(self) -> None:
        bounds = {
            "crop_padding": (0, 1), "crop_scale": (0.01, 1), "crop_ratio": (1, 10),
            "flip": (0, 1), "rotation": (0, 180), "shear": (0, 2), "zoom": (0, 0.9),
            "color_jitter": (0, 10), "hue": (0, 0.5), "grayscale": (0, 1),
            "rand_augment_ops": (1, 14), "rand_augment_magnitude": (0, 30),
            "random_erasing": (0, 1), "mixup_alpha": (0, 100), "cutmix_alpha": (0, 100),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"--{name} is {getattr(self, name)}; it must lie in {low}..{high}")


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


@dataclass
class FinetuneOptions:
    """Training options that the Trainer does not have, or that are looked at before it is imported."""

    output_dir: str | None = option(
        "outputs/finetuned", "Folder of the run: model, figures, checkpoints."
    )
    resume_from_checkpoint: str | None = option(
        None, "Go on from a checkpoint: last, or a checkpoint's folder."
    )
    seeds: int = option(
        1,
        "Runs with seeds seed, seed + 1, ..., in OUTPUT_DIR/seed-SEED; their figures' mean and spread in "
        "OUTPUT_DIR/seeds.json.",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto",
        "Number format of training: auto times a few steps of each, in each memory format and attention, and "
        "keeps the fastest that is sound.",
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = option(
        "auto", "Memory format of weights and images; auto goes with --precision auto."
    )
    attention: Literal["auto", "fused", "eager"] = option(
        "auto",
        "As the model comes, which is one kernel where there is one, or eager: the products of matrices that "
        "it stands for; auto goes with --precision auto.",
    )
    feature_views: int = option(
        1,
        "With --freeze backbone: compute the head's inputs once, of this many views of each image, and "
        "train on them; 0 runs the backbone in every step.",
    )
    head_solver: Literal["optimizer", "lbfgs"] = option(
        "optimizer",
        "With --freeze backbone: train the head in epochs, or solve for it exactly, with the penalty that "
        "does best on validation.",
    )
    layer_decay: float = option(
        1.0, "Share of the learning rate that each block has of the block behind it."
    )
    ema_decay: float = option(
        0.0,
        "Evaluate and save an average of the weights that keeps this share of itself in each step (less in "
        "the first ones), as 0.999; 0 for none.",
    )
    early_stopping_patience: int | None = option(
        None, "Stop after this many evaluations without a better validation accuracy."
    )
    calibrate: bool = option(
        True,
        "At the end, fit a temperature on validation and fold it into the head: the same labels, with "
        "probabilities that mean what they say. Of multi-label data, a threshold for each class instead.",
    )
    check_leakage: bool = option(
        False,
        "Before training, look for test images that are in train or validation too, exactly or nearly, and "
        "name them. Compares pixels alone, and nothing of test reaches the training.",
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Which saved model to evaluate, and on which split."""

    _argument_group_name = "evaluation"

    model_name_or_path: str = option(
        "", "Folder of a run, or a Hub id, of a fine-tuned model. Required."
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    split: Literal["validation", "test"] = option("validation", "Which split to evaluate.")
    output_dir: str | None = option(
        None, "Where to write metrics and predictions; the model's own folder if not given."
    )
    per_device_eval_batch_size: int = option(128, "Images per step and process.")
    dataloader_num_workers: int | None = option(
        None, "Loader processes; if not given, 0 for images held in memory, else one per core."
    )
    bf16: bool = option(False, "Evaluate under bfloat16 autocast.")
    fp16: bool = option(False, "Evaluate under float16 autocast (GPU).")
    corruptions: int = option(
        0,
        "Also measure the accuracy under five common corruptions at five severities, on this many images "
        "(stratified); 0 for none.",
    )
    use_cpu: bool = option(False, "Evaluate on the CPU even where there is a GPU.")
    trust_remote_code: bool = option(
        False,
        "Run code that comes with the checkpoint; of a Hub model, with a full commit as --model_revision.",
    )

    def __post_init__(self) -> None:
        if self.per_device_eval_batch_size < 1:
            raise UserError(
                f"--per_device_eval_batch_size is {self.per_device_eval_batch_size}; it must be at least 1"
            )
        if self.corruptions < 0:
            raise UserError(f"--corruptions is {self.corruptions}; it must be at least 0")
        _refuse_both_formats(self)


@dataclass(frozen=True)
class PredictConfig:
    """Which saved model is to classify which files."""

    _argument_group_name = "prediction"

    model_name_or_path: str = option(
        "", "Folder of a run, or a Hub id, of a fine-tuned model. Required."
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    top_k: int = option(5, "Number of classes listed for each image.")
    batch_size: int = option(32, "Images per step of a thread.")
    bf16: bool = option(False, "Predict under bfloat16 autocast.")
    fp16: bool = option(False, "Predict under float16 autocast (GPU).")
    use_cpu: bool = option(False, "Predict on the CPU even where there is a GPU.")
    trust_remote_code: bool = option(
        False,
        "Run code that comes with the checkpoint; of a Hub model, with a full commit as --model_revision.",
    )
    max_image_pixels: int = option(
        MAX_IMAGE_PIXELS,
        "An image of more pixels cannot be read: it is refused before it is decoded.",
    )

    def __post_init__(self) -> None:
        for name in ("top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        _check_max_image_pixels(self.max_image_pixels)
        _refuse_both_formats(self)


@dataclass(frozen=True)
class CompareConfig:
    """Which predictions of two runs to compare."""

    _argument_group_name = "comparison"

    split: Literal["auto", "validation", "test"] = option(
        "auto", "Which split's predictions; auto: test if both runs have it, else validation."
    )


@dataclass(frozen=True)
class ReproduceConfig:
    """Where a run is made again, and whether on other data."""

    _argument_group_name = "reproduction"

    output_dir: str | None = option(
        None, "Folder of the new run; that of the old one with -reproduced behind it if not given."
    )
    other_data: bool = option(
        False, "Go on although rows, labels or pixels are not what they were."
    )


@dataclass(frozen=True)
class ReportConfig:
    """What a report shows."""

    _argument_group_name = "report"

    gallery_size: int = option(24, "Pictures in each gallery; 0 for none.")
    check_duplicates: bool = option(
        True, "Look for evaluated images that are in train too, exactly or nearly."
    )

    def __post_init__(self) -> None:
        if self.gallery_size < 0:
            raise UserError(f"--gallery_size is {self.gallery_size}; it must be at least 0")


@dataclass(frozen=True)
class PushConfig:
    """Where on the Hub a finished run goes."""

    _argument_group_name = "push"

    repo_id: str = option(
        "", "Repository, NAME or NAMESPACE/NAME; made if it is not there. Required."
    )
    dry_run: bool = option(
        False, "Check everything and list what would be uploaded; upload nothing."
    )
    private: bool = option(True, "Make a new repository private; one that is there stays as it is.")
    revision: str | None = option(
        None, "Branch to push to, made from main if it is not there; main if not given."
    )

    def __post_init__(self) -> None:
        if not self.repo_id:
            raise UserError(
                "--repo_id is missing; pass the name of a repository, NAME or NAMESPACE/NAME"
            )


def _refuse_both_formats(config: Any) -> None:
    """Raises: UserError for --bf16 and --fp16 at once."""
    if config.bf16 and config.fp16:
        raise UserError("--bf16 and --fp16 exclude each other; pass one")


def _check_max_image_pixels(value: int) -> None:
    """Raises: UserError for a --max_image_pixels that Pillow does not open."""
    if not 1 <= value <= PILLOW_PIXELS:
        raise UserError(f"--max_image_pixels is {value}; it must lie in 1..{PILLOW_PIXELS}")


LIGHT_CONFIGS = (DataConfig, AugmentConfig, ModelConfig)


def refuse_occupied(folder: Path) -> None:
    """Raises: UserError if an output folder holds a run, finished or not, or is a file."""
    if folder.is_file():
        raise UserError(f"--output_dir {folder} is a file; pass a folder")
    if (folder / "config.json").exists() or any(folder.glob("checkpoint-*")):
        raise UserError(
            f"{folder} holds another run; pass another --output_dir, or --resume_from_checkpoint last"
        )
    if (folder / CONFIG_FILE).exists():
        raise UserError(
            f"{folder} holds another run, which saved no checkpoint; pass another --output_dir, or remove it"
        )
    if any(folder.glob(f"seed-*/{CONFIG_FILE}")):
        raise UserError(
            f"{folder} holds runs with --seeds; pass another --output_dir, or go on with the same --seeds "
            "and --resume_from_checkpoint last"
        )


BOUNDS = {
    "per_device_train_batch_size": (1, 2**20), "per_device_eval_batch_size": (1, 2**20),
    "gradient_accumulation_steps": (1, 2**20), "num_train_epochs": (1e-6, 1e6),
    "learning_rate": (1e-12, 1e3), "weight_decay": (0, 1e3), "label_smoothing_factor": (0, 0.999),
    "dataloader_num_workers": (0, 1024), "early_stopping_patience": (1, 10**6),
    "layer_decay": (0.01, 1), "max_grad_norm": (0, 1e6), "seed": (0, 2**32 - 1), "feature_views": (0, 1000),
    "seeds": (1, 1000), "ema_decay": (0, 0.999999),
}  # fmt: skip
MULTI_LABEL_METRICS = ("average_precision_macro", "f1_macro")
BEST_METRICS = ("accuracy", "cross_entropy", "loss", *MULTI_LABEL_METRICS)
# The Trainer's, but not ours: the model always trains, hub.py pushes once, and batches are made to measure.
WITHOUT_EFFECT = ("do_train", "hub_strategy", "hub_always_push", "remove_unused_columns")


def check_bounds(name: str, value: float | None) -> None:
    """Raises: UserError for a training option out of its range."""
    low, high = BOUNDS.get(name, (-math.inf, math.inf))
    if value is not None and not low <= value <= high:
        raise UserError(f"--{name} is {value:g}; it must lie in {low:g}..{high:g}")


# Words for true and false.
TRUTH = ("true", "false", "yes", "no", "t", "f", "y", "n", "1", "0")
# What may differ when a run goes on: how long, where, what is shown and kept. All else is the run itself.
MAY_CHANGE = re.compile(
    r"num_train_epochs|max_steps|output_dir|resume_.*|early_stopping_.*|(eval|save|logging|log|hub|dataloader)_.*|"
    r"do_.*|check_leakage|push_to_hub|load_best_.*|metric_.*|greater_.*|report_to|run_name|disable_tqdm|use_cpu|"
    r"trust_remote_code|per_device_eval_.*|pixel_store|precision|memory_format|attention|torch_compile.*|bf16|fp16|tf32"
)


def check_same_run(folder: Path, options: dict[str, Any]) -> list[str]:
    """Before a run goes on: the options that make it what it is must be those of its config.yaml.

    options: by name; None stands for a default. Returns what else differs, as `--NAME NEW, which was OLD`.
    Raises: UserError for the first that may not differ.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return []
    changes = []
    # What a config.yaml does not name had its default.
    defaults = {
        f.name: f.default for c in (*LIGHT_CONFIGS, FinetuneOptions) for f in dataclasses.fields(c)
    }
    saved = yaml.safe_load(path.read_text()) or {}
    for name, value in options.items():
        before = saved.get(name, defaults.get(name, "its default"))
        # The order of a stream depends on how many workers share its shards.
        fixed = name == "dataloader_num_workers" and options.get("streaming")
        if value in (None, before):
            continue
        if fixed or not MAY_CHANGE.fullmatch(name):
            raise UserError(
                f"--resume_from_checkpoint: --{name} is {value}, but the run in {folder} began with "
                f"{before}; go on with --config {path}, or start anew in another --output_dir"
            )
        changes.append(f"--{name} {value}, which was {before}")
    return changes


def run_to_resume(output_dir: str, resume_from_checkpoint: str | None) -> Path | None:
    """The folder of the run that is to go on, or None for a new one."""
    value = resume_from_checkpoint
    if value is None or value.lower() in ("false", "no"):
        return None
    if value.lower() in ("true", "last", "latest"):
        return Path(output_dir)
    return Path(value).parent


def recipe_names() -> list[str]:
    """Names that `--recipe` takes."""
    folder = resources.files("hf_cifar") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_recipe(name: str) -> str:
    """Text of a packaged recipe. Raises: UserError for an unknown name."""
    if name not in recipe_names():
        raise UserError(
            f"no recipe {name!r}{nearest_hint(name, recipe_names())}; see: hf-cifar recipes"
        )
    return (resources.files("hf_cifar") / "recipes" / f"{name}.yaml").read_text()


def yaml_tokens(text: str | bytes, source: str) -> list[str]:
    """A YAML file as a command line: null keeps the default, a list is several tokens.

    Raises: UserError for anything but option names with their values.
    """
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{source} holds a {type(values).__name__}; it must map option names to values"
        )
    tokens = []
    for name, value in values.items():
        if value is None:
            continue
        tokens.append(f"--{name}")
        if isinstance(value, dict):
            tokens.append(json.dumps(value))
        else:
            tokens.extend(str(item) for item in (value if isinstance(value, list) else [value]))
    return tokens


def expand_tokens(argv: Sequence[str]) -> list[str]:
    """Replace `--recipe NAME` and `--config FILE` by their tokens, in this order and before all flags."""
    rest, recipe, config = [], [], []
    tokens = iter(argv)
    for token in tokens:
        name, has_value, value = token.partition("=")
        if name not in ("--recipe", "--config"):
            rest.append(token)
            continue
        if not has_value:
            value = next(tokens, None)
            if value is None:
                raise UserError(f"{name} needs a value; see: hf-cifar recipes")
        if name == "--recipe":
            recipe += yaml_tokens(read_recipe(value), f"recipe {value}")
        else:
            path = Path(value)
            if not path.is_file():
                raise UserError(f"--config: no file {value}; see also: hf-cifar recipes")
            config += yaml_tokens(path.read_bytes(), value)
    return recipe + config + rest


def run_data_tokens(folder: Path) -> list[str]:
    """The data options of a run's config.yaml, as tokens; none without the file."""
    path, names = folder / CONFIG_FILE, field_names(DataConfig)
    if not path.is_file():
        return []
    tokens, kept = yaml_tokens(path.read_bytes(), str(path)), False
    chosen = []
    for token in tokens:  # an option, then its values
        if token.startswith("--"):
            kept = token[2:] in names
        if kept:
            chosen.append(token)
    return chosen


def run_data(folder: Path) -> DataConfig:
    """The data of a run. Raises: UserError if the folder has no config.yaml."""
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE} that names its data")
    data, *_ = parse_dataclasses([DataConfig], run_data_tokens(folder), "hf-cifar", add_help=False)
    return data


def field_names(config_class: type) -> list[str]:
    """Names of the options that a configuration class declares."""
    return [f.name for f in dataclasses.fields(config_class) if f.init]


@functools.cache
def trainer_options() -> dict[str, str | tuple[str, ...]]:
    """Options of transformers' TrainingArguments: each with its type, or with the words that it takes.

    Read from the source, because importing it would import torch.
    """
    folder = Path(importlib.util.find_spec("transformers").origin).parent
    files = [folder / "trainer_utils.py", folder / "training_args.py"]
    nodes = [node for path in files for node in ast.parse(path.read_text()).body]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    options: dict[str, str | tuple[str, ...]] = {}
    for field_ in classes["TrainingArguments"].body:
        if isinstance(field_, ast.AnnAssign) and not field_.target.id.startswith("_"):
            kind = ast.unparse(field_.annotation)
            enumeration = classes.get(kind.removesuffix(" | str"))
            options[field_.target.id] = _words(enumeration) if enumeration else kind
    return options


def _words(enumeration: ast.ClassDef) -> tuple[str, ...]:
    """The values of an enumeration's members."""
    return tuple(
        ast.literal_eval(item.value) for item in enumeration.body if isinstance(item, ast.Assign)
    )


def check_values(tokens: Sequence[str], options: dict[str, str | tuple[str, ...]]) -> None:
    """Find a mistake in a training option before it is parsed, which takes torch.

    Raises: UserError for the first value that is no number, out of range, or no word that its option
    takes, and for an option that would have no effect.
    """
    options = {
        **options,
        "metric_for_best_model": (*BEST_METRICS, *(f"eval_{m}" for m in BEST_METRICS)),
    }
    for token, following in zip(tokens, [*tokens[1:], ""], strict=False):
        flag, has_value, value = token.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        kind = options.get(name)
        value = value if has_value else following
        if name in WITHOUT_EFFECT and (name, value) != ("remove_unused_columns", "false"):
            raise UserError(f"--{name} has no effect here; leave it out")
        if isinstance(kind, tuple) and value not in kind:
            hint = nearest_hint(value, kind) or f"; it takes {', '.join(kind[:8])}"
            raise UserError(f"{flag} does not take {value!r}{hint}")
        if kind in ("int", "float", "int | None", "float | None"):
            try:
                check_bounds(name, (int if kind.startswith("int") else float)(value))
            except UserError:
                raise
            except ValueError:
                number = "a whole number" if kind.startswith("int") else "a number"
                raise UserError(f"{flag} takes {number}, not {value!r}") from None
        if "dict" in str(kind) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise UserError(f"{flag} takes JSON, and {value!r} is none: {error}") from None


def check_words(tokens: Iterable[str], kinds: dict[str, str | tuple[str, ...]]) -> None:
    """Raises: UserError for a word that no option takes.

    kinds: each option's type, or the words that it takes.
    """
    flag, kind, num_left = "", "", 0
    for token in tokens:
        if token.startswith("--"):
            flag, has_value, value = token.partition("=")
            kind = str(kinds.get(flag[2:].replace("-", "_"), "nothing"))  # as --no_calibrate
            num_left = 0 if kind == "nothing" else math.inf if "list" in kind else 1
        else:
            has_value, value = "=", token
        if not has_value:
            continue
        if num_left == 0:
            raise UserError(f"unexpected argument {value!r}; options start with --, see --help")
        if kind == "bool" and value.lower() not in TRUTH:
            raise UserError(f"{flag} takes true or false, not {value!r}")
        num_left -= 1


def check_option_names(tokens: Iterable[str], known: Iterable[str]) -> None:
    """Raises: UserError that names the nearest option for the first unknown one."""
    known = set(known)
    for token in tokens:
        flag = token.partition("=")[0]
        name = flag[2:].replace("-", "_")
        if flag.startswith("--") and name not in known and name.removeprefix("no_") not in known:
            raise UserError(f"no option {flag}{nearest_hint(name, known, '--')}; see --help")


@functools.cache
def _argument_parser() -> type:
    """transformers' HfArgumentParser. Its file needs no other, and the package takes seconds."""
    path = Path(importlib.util.find_spec("transformers").origin).with_name("hf_argparser.py")
    spec = importlib.util.spec_from_file_location("hf_argparser", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HfArgumentParser


def parse_dataclasses(
    classes: Sequence[type], tokens: Sequence[str], prog: str, **parser_options: Any
):
    """Build one instance of each dataclass from command line tokens; also returns what is left over.

    Raises: UserError for a missing or malformed value.
    """
    parser = _argument_parser()(list(classes), prog=prog, allow_abbrev=False, **parser_options)

    def fail(message: str) -> None:
        raise UserError(message)

    parser.error = fail
    return parser.parse_args_into_dataclasses(
        _explicit_flags(classes, tokens), return_remaining_strings=True, look_for_args_file=False
    )


def _explicit_flags(classes: Sequence[type], tokens: Sequence[str]) -> list[str]:
    """Write a bare `--flag` as `--flag true`: the parser would take a file name behind it for its value."""
    hints = {name: hint for c in classes for name, hint in get_type_hints(c).items()}
    explicit = []
    for token, following in zip(tokens, [*tokens[1:], ""], strict=False):
        explicit.append(token)
        is_flag = token.startswith("--") and hints.get(token[2:].replace("-", "_")) is bool
        if is_flag and following.lower() not in TRUTH:
            explicit.append("true")
    return explicit
