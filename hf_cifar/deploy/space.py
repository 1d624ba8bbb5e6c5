"""Write a Hugging Face Space that shows a model with Gradio and plain Transformers."""

from __future__ import annotations

import logging
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import yaml

from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.model import is_exported
from hf_cifar.errors import UserError
from hf_cifar.hub.push import CARD_FILE, PushPlan, Target, plan_files
from hf_cifar.models.files import (
    CONFIG,
    INDEX,
    PROCESSOR_FILES,
    model_folder,
    read_object,
    weight_files,
)
from hf_cifar.models.value_range import saved_value_range
from hf_cifar.runs.folder import RunFolder, new_folder, refuse_other_files, write_text
from hf_cifar.text import enumerated

logger = logging.getLogger(__name__)
APP, REQUIREMENTS, MODELS = "app.py", "requirements.txt", "models"
FILES = (APP, REQUIREMENTS, CARD_FILE, MODELS, "examples")
PACKAGES = ("gradio", "pillow", "torch", "torchvision", "transformers")
DESCRIPTION = "Classify pictures with a fine-tuned model"


def check_space(models: Sequence[PredictConfig], space: Path) -> None:
    """Raises: UserError for a folder with other files, or a model that Transformers alone cannot run."""
    refuse_other_files(space, FILES, "--space")
    for model in models:
        name = model.model_name_or_path
        if is_exported(name):
            raise UserError(
                f"a Space runs a model with Transformers, and {name} is an exported file; pass the run that "
                "was exported, or leave out --space"
            )
        if saved_value_range(name, model.model_revision, trust_remote_code=model.trust_remote_code):
            raise UserError(
                f"{name} was trained on images of more than 8 bits, which plain Transformers reads "
                "differently; leave out --space, and run the demo with hf-cifar"
            )


@contextmanager
def write_space(models: Mapping[str, PredictConfig], space: Path) -> Iterator[Path]:
    """Write models, by title, with an app and its requirements. Yields the unfinished folder for more files;
    it replaces `space` at the end of the block."""
    with new_folder(space) as folder:
        sources = {
            title: model_folder(
                model.model_name_or_path, model.model_revision, model.trust_remote_code
            )
            for title, model in models.items()
        }
        names = [re.sub(r"[^\w.-]+", "-", title).strip("-.") or "model" for title in models]
        if len(set(names)) < len(names):
            names = [f"{name}-{number}" for number, name in enumerate(names, 1)]
        packages = list(PACKAGES)
        if any(read_object(source / CONFIG).get("reject") for source in sources.values()):
            logger.info(
                "the Space assigns a class to every image, because pipeline does not reject images"
            )
        for name, source in zip(names, sources.values(), strict=True):
            target = folder / MODELS / name
            target.mkdir(parents=True)
            for file in _model_files(source):
                shutil.copyfile(file, target / file.name)
            if read_object(source / CONFIG).get("model_type") == "timm_wrapper":
                packages.append("timm")
        top_k = next(iter(models.values())).top_k
        title = enumerated(list(models))
        app = _rendered("space_app.jinja", title=title, models=names, top_k=top_k)
        if (space / APP).exists() and (space / APP).read_text(encoding="utf-8") != app:
            raise UserError(
                f"--space {space} holds another Space, or its {APP} was edited; pass a new folder, or remove "
                "it"
            )
        write_text(folder / APP, app)
        pins = sorted({f"{each}=={version(each).partition('+')[0]}" for each in packages})
        write_text(folder / REQUIREMENTS, "\n".join(pins) + "\n")
        runs = {title: RunFolder(source) for title, source in sources.items()}
        write_text(folder / CARD_FILE, _card(title, runs))
        yield folder


def plan_space(space: Path, repo_id: str, private: bool) -> PushPlan:
    """Check everything about the push of a written Space, see `hub.push.plan_files`."""
    files = {
        path.relative_to(space).as_posix(): path
        for path in sorted(space.rglob("*"))
        if path.is_file()
    }
    card = (space / CARD_FILE).read_text(encoding="utf-8")
    return plan_files(space, Target(repo_id, private, kind="space"), files, lambda _: card)


def _model_files(source: Path) -> list[Path]:
    """List the files that Transformers needs. Links to the Hub's cache are followed."""
    others = [source / name for name in (CONFIG, *PROCESSOR_FILES, INDEX)]
    return [*filter(Path.is_file, others), *weight_files(source), *sorted(source.glob("*.py"))]


def _card(title: str, runs: Mapping[str, RunFolder]) -> str:
    facts = {name: run.facts() for name, run in runs.items()}
    licenses = {each.get("model", {}).get("license") for each in facts.values()}
    metadata: dict[str, Any] = {
        "title": title,
        "emoji": "🖼️",
        "colorFrom": "blue",
        "colorTo": "indigo",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": APP,
        "short_description": DESCRIPTION,
        "tags": ["image-classification", "hf-cifar"],
    }
    for key, part in (("models", "model"), ("datasets", "dataset")):
        ids = {each.get(part, {}).get("hub_id") for each in facts.values()} - {None, ""}
        if ids:
            metadata[key] = sorted(ids)
    if len(licenses) == 1 and (license := licenses.pop()):
        metadata["license"] = license
    models = []
    for name, run in runs.items():
        metrics = run.metrics()
        measured = {
            split: metrics[split]["accuracy"]
            for split in ("test", "validation")
            if "accuracy" in metrics.get(split, {})
        }
        models.append((name, next(iter(measured.items()), None)))
    return _rendered(
        "space_card.jinja",
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        title=title,
        models=models,
    )


def _rendered(name: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_cifar"),
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(**values)
