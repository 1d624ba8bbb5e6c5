"""The model card, and the push to the Hub."""

from __future__ import annotations

import platform
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants

from hf_cifar.config import RunConfig
from hf_cifar.data.splits import Splits
from hf_cifar.data.streams import Stream
from hf_cifar.errors import UserError
from hf_cifar.evaluation.multilabel import headline
from hf_cifar.evaluation.predictions import render_cell
from hf_cifar.network import looks_like_path, require_network

PACKAGES = (
    "hf-cifar",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "evaluate",
    "timm",
    "huggingface_hub",
)
# What a stranger needs to use and judge the model; no checkpoint, pickle, or config with paths.
PUSHED_FILES = [
    "config.json",
    "*.safetensors*",
    "preprocessor_config.json",
    "README.md",
    "metrics.json",
    "*.py",
]
UNPUSHED_FILES = ["*/*"]  # a pattern's * matches slashes too: nothing from checkpoints
BASE_MODELS = {"bundled/efficientnet_lite0": "timm/tf_efficientnet_lite0.in1k"}

TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ summary }}

## Use

```python
from transformers import pipeline

classify = pipeline("image-classification", model="{{ repo_id }}"{{ custom_code }})
classify("image.png")
```

## Results

{{ results }}

{{ selection }}

## Data

{{ data }}

## Procedure

{{ procedure }}

## Environment

{{ environment }}
"""


def environment() -> dict[str, str]:
    """Versions, platform and commit of what runs now."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _commit()
    return versions | ({"commit": commit} if commit else {})


def _commit() -> str | None:
    """Commit of the checkout that this package runs from, with -dirty; None outside a checkout."""
    folder = Path(__file__).parent
    command = [
        "git",
        "-C",
        str(folder),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        inside = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__], capture_output=True
        )
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if inside.returncode == 0 and done.returncode == 0 else None


def public_name(name: str) -> str:
    """A data set or model name without the folders of the machine that it lay on."""
    return Path(name).expanduser().resolve().name if looks_like_path(name) else name


def render_model_card(
    config: RunConfig,
    splits: Splits,
    metrics: dict[str, Any],
    facts: dict[str, Any],
    *,
    custom_code: bool,
) -> str:
    """README.md of a run, from the facts of that run; holds no local path and no token."""
    dataset, base = (
        public_name(config.data.dataset_name),
        public_name(config.model.model_name_or_path),
    )
    repo_id = config.train.hub_model_id or public_name(config.train.output_dir + "/.")
    on_hub = not looks_like_path(config.model.model_name_or_path) and "scratch/" not in base
    base_model = BASE_MODELS.get(base, base if on_hub else None)
    dataset_on_hub = not (
        looks_like_path(config.data.dataset_name) or dataset.startswith("bundled/")
    )
    card_data = ModelCardData(
        model_name=repo_id.split("/")[-1],
        pipeline_tag="image-classification",
        library_name="transformers",
        tags=["image-classification", "hf-cifar"],
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=[dataset] if dataset_on_hub else None,
        metrics=["accuracy"],
        eval_results=[
            EvalResult(
                task_type="image-classification", dataset_type=dataset, dataset_name=dataset,
                dataset_split=split, metric_type="accuracy",
                metric_value=round(figures["accuracy"], 6),
            )
            for split, figures in metrics.items()
        ],
    )  # fmt: skip
    options = config.options()
    hidden = {"output_dir", "dataset_name", "model_name_or_path", "hub_model_id"}
    shown = {
        name: value for name, value in options.items()
        if name not in hidden and value is not None and not _is_path(value)
    }  # fmt: skip
    seconds = facts["train_seconds"]
    start = "trained from random weights" if base.startswith("scratch/") else "fine-tuned"
    card = ModelCard.from_template(
        card_data,
        template_str=TEMPLATE,
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        custom_code=", trust_remote_code=True" if custom_code else "",
        summary=(
            f"`{base}`, {start} to tell {len(splits.id2label)} classes of `{dataset}`: "
            + ", ".join(splits.id2label.values()) + "."
        ),
        results=_results_table(metrics),
        selection=(
            ("Validation chose the checkpoint; test" if config.train.load_best_model_at_end
             else "Test") + " was not read before the end of the run. In brackets: 95% intervals."
            + _calibration(metrics)
        ),
        data=(
            f"`{dataset}`: {len(splits.train):,} images to train on, "
            f"{len(splits.validation):,} for validation, "
            + _validation_source(splits, config.data.split_seed)
            + f"Split hash ({_hashed(splits)}): `{splits.hash}`."
        ),
        procedure=(
            f"{facts['trainable']}. {facts['steps']:,} steps in {seconds:,.0f} s on "
            f"{facts['device']}, {facts['processes']} "
            f"process{'es' if facts['processes'] > 1 else ''}. "
            f"Seed {config.train.seed}. Options:\n\n"
            + _table(("option", "value"), [(f"`{k}`", f"`{v}`") for k, v in shown.items()])
        ),
        environment=_table(("package", "version"), list(facts["environment"].items())),
    )  # fmt: skip
    return card.content


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and (
        value.startswith(("/", "~", "./", "../")) or Path(value).is_absolute()
    )


def _results_table(metrics: dict[str, Any]) -> str:
    shown = headline(next(iter(metrics.values())))
    rows = [
        (split, *(render_cell(figures, key) for key in shown)) for split, figures in metrics.items()
    ]
    return _table(("split", *shown), rows)


def _calibration(metrics: dict[str, Any]) -> str:
    """A sentence on the temperature, with what it did on the last split; nothing without one."""
    split, figures = list(metrics.items())[-1]
    if "temperature" not in figures:
        return ""
    return (
        f" Calibrated on validation: the logits are divided by {figures['temperature']:.3f}, which took the "
        f"expected calibration error on {split} from {figures['ece_uncalibrated']:.4f} to "
        f"{figures['ece']:.4f}."
    )


def _hashed(splits: Splits) -> str:
    if isinstance(splits.train, Stream):
        return "SHA-256 over validation's row ids and labels, and over how train is drawn"
    return "SHA-256 over row ids and labels"


def _validation_source(splits: Splits, seed: int) -> str:
    if splits.validation.source_split != splits.train.source_split:
        return "the data set's own validation split. "
    if isinstance(splits.train, Stream):
        return f"the first of those that a hash of their bytes holds out, split seed {seed}. "
    return f"stratified, split seed {seed}. "


def _table(header: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def check_push(config: RunConfig) -> None:
    """Raises: UserError if --push_to_hub has no network or no token."""
    if not config.train.push_to_hub or config.train.process_index != 0:
        return
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "--push_to_hub needs the network, but HF_HUB_OFFLINE=1 forbids it; unset one of them"
        )
    require_network("--push_to_hub")
    if not (config.train.hub_token or huggingface_hub.get_token()):
        raise UserError("--push_to_hub needs a token; run: hf auth login, or set HF_TOKEN")


def prepare_push(config: RunConfig) -> None:
    """Create the repo, or see that it is there: fail before training if the push could not work.

    Raises: UserError for a refusal by the Hub.
    """
    if not config.train.push_to_hub or config.train.process_index != 0:
        return
    try:
        _create_repo(config)
    except Exception as error:  # the client raises its own, httpx's and OS errors
        raise UserError(
            f"--push_to_hub: cannot create {_repo_name(config)}: {_reason(error)}"
        ) from None


def _repo_name(config: RunConfig) -> str:
    return config.train.hub_model_id or Path(config.train.output_dir).resolve().name


def _create_repo(config: RunConfig) -> huggingface_hub.RepoUrl:
    api = huggingface_hub.HfApi(token=config.train.hub_token)
    return api.create_repo(_repo_name(config), private=config.train.hub_private_repo, exist_ok=True)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def push_run(config: RunConfig) -> str:
    """Upload a finished run's model, card and figures in one commit; returns the repo's URL.

    Raises: UserError that says how to retry; the model stays saved in the run's folder.
    """
    folder = config.train.output_dir
    try:
        repo = _create_repo(config)
        # Only now is the user's own namespace known, where --hub_model_id leaves it out.
        card = Path(folder) / "README.md"
        card.write_text(card.read_text().replace(f'"{_repo_name(config)}"', f'"{repo.repo_id}"'))
        huggingface_hub.HfApi(token=config.train.hub_token).upload_folder(
            repo_id=repo.repo_id,
            folder_path=folder,
            allow_patterns=PUSHED_FILES,
            ignore_patterns=list(UNPUSHED_FILES),
            revision=config.train.hub_revision,
            commit_message="Fine-tuned with hf_cifar",
        )
    except Exception as error:  # as above
        name = _repo_name(config)
        retry = ["hf", "upload", name, str(folder), "."]
        retry += [part for pattern in PUSHED_FILES for part in ("--include", pattern)]
        retry += [part for pattern in UNPUSHED_FILES for part in ("--exclude", pattern)]
        retry += ["--revision", config.train.hub_revision] if config.train.hub_revision else []
        raise UserError(
            f"push to {name} failed ({_reason(error)}); the model is saved in {folder}; "
            f"retry with: {shlex.join(retry)}"
        ) from None
    return str(repo)
