"""The model card: README.md and its metadata, from the files that a run leaves."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from hf_cifar.config.model import SCRATCH
from hf_cifar.errors import UserError
from hf_cifar.evaluation.mistakes import confused_pairs
from hf_cifar.evaluation.multi_label import headline
from hf_cifar.evaluation.tables import render_cell, render_figure
from hf_cifar.hub.origin import HUB
from hf_cifar.hub.push import CARD_FILE, EVAL_RESULTS_FOLDER
from hf_cifar.report.public import public_options
from hf_cifar.report.wording import (
    hashed,
    license_note,
    render_energy,
    render_leakage,
    render_procedure,
    render_skipped,
    role_of,
    validation_source,
)
from hf_cifar.runs.folder import CONFIG_FILE, METRICS_FILE, RUN_FILE
from hf_cifar.text import listed, one_line

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")  # a folder may be called hf_flowers
MAX_CLASSES = 50  # in a table
MAX_NAMES = 20  # in a sentence
NUM_WEAKEST, NUM_PAIRS = 3, 5
OURS = """@software{{hf_cifar,
  title = {{hf_cifar: fine-tune pretrained image classifiers}},
  version = {{{version}}}
}}"""


@dataclass(frozen=True)
class CardFacts:
    """All that a card says.

    repo_id: what the code in it loads. options: those of config.yaml. run: of run.json, or what is known of
    it before training. metrics: figures by split, as in metrics.json. class_names: in the order of their ids.
    """

    repo_id: str
    options: dict[str, Any]
    run: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    class_names: list[str]
    custom_code: bool = False

    @classmethod
    def load(cls, folder: Path) -> CardFacts:
        """The facts of a finished run. Raises: UserError if the folder holds none."""
        try:
            options = yaml.safe_load((folder / CONFIG_FILE).read_text())
            run = json.loads((folder / RUN_FILE).read_text())
            facts = cls(
                repo_id=run["repo_id"],
                options=options,
                run=run,
                metrics=json.loads((folder / METRICS_FILE).read_text()),
                class_names=_class_names(json.loads((folder / "config.json").read_text())),
                custom_code=any(folder.glob("*.py")),
            )
            render_card(facts)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError,
                jinja2.UndefinedError) as error:  # fmt: skip
            raise UserError(
                f"{folder} holds no finished run that a card could be made of "
                f"({type(error).__name__}: {one_line(error, 200)}); pass the --output_dir of one"
            ) from None
        return facts


def _class_names(config: dict[str, Any]) -> list[str]:
    """Of a saved model's config.json; timm's have a list."""
    if "label_names" in config:
        return list(config["label_names"])
    return [config["id2label"][key] for key in sorted(config["id2label"], key=int)]


def render_card(facts: CardFacts) -> str:
    """README.md of a run, metadata and text; holds no local path and no token."""
    run, options, metrics = facts.run, facts.options, facts.metrics
    model, dataset = run["model"], run["dataset"]
    last_split = list(metrics)[-1] if metrics else "validation"
    last = metrics.get(last_split, {})
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "code": _code}
    template = resources.files("hf_cifar") / "templates" / "model_card.md"
    text = environment.from_string(template.read_text()).render(
        metadata=card_metadata(facts).to_yaml(),
        name=facts.repo_id.split("/")[-1],
        repo_id=facts.repo_id,
        custom_code=facts.custom_code,
        base=model["name"],
        from_scratch=model["name"].startswith(SCRATCH),
        dataset=dataset["name"],
        num_labels=len(facts.class_names),
        classes=listed(facts.class_names, MAX_NAMES),
        headline=_headline(metrics),
        results=[_result(split, metrics[split], options) for split in reversed(metrics)],
        temperature=_temperature(metrics),
        calibration=_calibration(metrics),
        per_class=_per_class(last),
        per_class_note=_per_class_note(last_split, last),
        last_split=last_split,
        weaknesses=_weakest(last),
        confused=_confused(last),
        dataset_link=_link(dataset),
        dataset_license=dataset["license_name"] or dataset["license"],
        num_train=f"{run['num_train']:,}",
        num_validation=f"{run['num_validation']:,}",
        validation_source=validation_source(run, options),
        hashed=hashed(options),
        skipped=render_skipped(run, metrics),
        leakage=render_leakage(run),
        split_hash=run["split_hash"],
        procedure=render_procedure(run, options),
        options=_shown_options(options),
        energy=render_energy(run.get("energy")),
        measured_on=" and ".join(metrics) or "validation",
        license_note=license_note(model),
        environment=list(run["environment"].items()),
        citations=[
            *model["citations"],
            *(entry for entry in dataset["citations"] if entry not in model["citations"]),
            OURS.format(version=run["environment"].get("hf-cifar", "0")),
        ],
    )  # fmt: skip
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return TOKEN.sub("hf_...", text)


def card_metadata(facts: CardFacts) -> ModelCardData:
    """What the Hub reads: origin, licence, task, and the accuracy on each split as a model-index."""
    model, dataset = facts.run["model"], facts.run["dataset"]
    base_model = model["hub_id"]
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset["hub_id"] or dataset["name"],
            dataset_name=dataset["name"],
            dataset_config=facts.options.get("dataset_config_name"),
            dataset_split=split,
            metric_type="accuracy",
            metric_value=round(figures["accuracy"], 6),
        )
        for split, figures in facts.metrics.items()
        if "accuracy" in figures
    ]
    return ModelCardData(
        model_name=facts.repo_id.split("/")[-1],
        license=model["license"],
        license_name=model["license_name"],
        license_link=model["license_link"],
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["image-classification", "hf-cifar"],
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=[dataset["hub_id"]] if dataset["hub_id"] else None,
        metrics=["accuracy"],
        eval_results=results or None,
    )


def render_eval_results(facts: CardFacts) -> str | None:
    """The accuracy on test as YAML of the Hub's `.eval_results/`; None without one, or where it is no result
    of a data set on the Hub, as on a part of test."""
    dataset, figures = facts.run["dataset"], facts.metrics.get("test", {})
    part = facts.options.get("max_eval_samples") or "skipped_rows" in figures
    if not dataset["hub_id"] or "accuracy" not in figures or part:
        return None
    value, interval = figures["accuracy"], figures.get("intervals", {}).get("accuracy")
    between = f", 95% interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
    entry = EvalResultEntry(
        dataset_id=dataset["hub_id"],
        task_id=facts.options.get("dataset_config_name") or "default",
        value=round(value, 6),
        notes=f"accuracy, 0 to 1, of {figures['num_images']:,} images{between}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def save_card(folder: Path) -> None:
    """Write README.md and `.eval_results/` of a finished run, from its other files."""
    facts = CardFacts.load(folder)
    (folder / CARD_FILE).write_text(render_card(facts))
    results = render_eval_results(facts)
    if results is not None:
        path = (
            folder / EVAL_RESULTS_FOLDER / f"{facts.run['dataset']['hub_id'].split('/')[-1]}.yaml"
        )
        path.parent.mkdir(exist_ok=True)
        path.write_text(results)


def is_untouched(folder: Path) -> bool:
    """Whether a run's card is as `save_card` wrote it, for the figures as they are now."""
    card = folder / CARD_FILE
    try:
        return card.is_file() and card.read_text() == render_card(CardFacts.load(folder))
    except UserError:
        return False


def card_for(folder: Path, repo_id: str) -> str:
    """A run's card for the repo that it goes to: one that somebody edited stays as it is, but for the name
    that its code loads. Raises: UserError if the folder holds no finished run."""
    facts = CardFacts.load(folder)
    card = folder / CARD_FILE
    text = card.read_text() if card.is_file() else None
    if text in (None, render_card(facts)):
        return render_card(dataclasses.replace(facts, repo_id=repo_id))
    return text.replace(f'"{facts.repo_id}"', f'"{repo_id}"')


def _cell(value: Any) -> str:
    """A value as it can stand in a table."""
    return one_line(value).replace("|", "\\|")


def _code(value: str) -> str:
    return f"`{value.replace('`', '')}`"


def _headline(metrics: dict[str, dict[str, Any]]) -> str:
    split = next(
        (name for name in ("test", "validation") if "accuracy" in metrics.get(name, {})), None
    )
    if split is None:
        return ""
    figures = metrics[split]
    return f"Accuracy on {split}: {render_cell(figures, 'accuracy')}, of {figures['num_images']:,} images"


def _result(split: str, figures: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for key in headline(figures):
        if key in figures and key != "num_images":
            interval = figures.get("intervals", {}).get(key)
            between = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "-"
            rows.append((key, render_figure(figures[key]), between))
    role = role_of(split, figures, options)
    return {"name": split, "num_images": f"{figures['num_images']:,}", "role": role, "rows": rows}


def _temperature(metrics: dict[str, dict[str, Any]]) -> str:
    found = [figures["temperature"] for figures in metrics.values() if "temperature" in figures]
    return f"{found[-1]:.3f}" if found else ""


def _calibration(metrics: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (split, key, render_figure(figures[f"{key}_uncalibrated"]), render_figure(figures[key]))
        for split, figures in reversed(metrics.items())
        for key in ("ece", "cross_entropy")
        if f"{key}_uncalibrated" in figures
    ]


def _ranked(figures: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Classes that have images, by F1 from the lowest."""
    classes = [
        (name, own) for name, own in figures.get("per_class", {}).items() if own["num_images"]
    ]
    return sorted(classes, key=lambda item: item[1]["f1"])


def _per_class(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    classes = list(figures.get("per_class", {}).items())
    if len(classes) > MAX_CLASSES:
        classes = _ranked(figures)[:MAX_CLASSES]
    intervals = figures.get("intervals", {}).get("per_class", {})
    return [
        (
            name,
            f"{own['num_images']:,}",
            *(
                render_cell({**own, "intervals": intervals.get(name, {})}, key)
                for key in ("precision", "recall", "f1")
            ),
        )
        for name, own in classes
    ]


def _per_class_note(split: str, figures: dict[str, Any]) -> str:
    count = len(figures.get("per_class", {}))
    if count > MAX_CLASSES:
        shown = f"the {MAX_CLASSES} classes of {count:,} with the lowest F1"
        return f"On {split}, {shown}; in brackets: 95% intervals."
    return f"On {split}; in brackets: 95% intervals."


def _weakest(figures: dict[str, Any]) -> str:
    return ", ".join(
        f"{one_line(name)} ({render_figure(own['f1'])})"
        for name, own in _ranked(figures)[:NUM_WEAKEST]
    )


def _confused(figures: dict[str, Any]) -> list[tuple[str, ...]] | None:
    if "confusion_matrix" not in figures:  # of several labels an image
        return None
    pairs = confused_pairs(figures["confusion_matrix"], list(figures["per_class"]), NUM_PAIRS)
    return [
        (pair["truth"], pair["prediction"], f"{pair['num_images']:,}", f"{pair['share']:.1%}")
        for pair in pairs
    ]


def _link(dataset: dict[str, Any]) -> str:
    name = dataset["name"]
    return f"[{name}]({HUB}/datasets/{dataset['hub_id']})" if dataset["hub_id"] else _code(name)


def _shown_options(options: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f"`{name}`", _code(str(value))) for name, value in public_options(options).items()]
