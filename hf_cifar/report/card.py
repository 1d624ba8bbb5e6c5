"""The model card: render README.md and its metadata from the files of a run."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from hf_cifar.config.metrics import UNCALIBRATED, shown
from hf_cifar.config.model import SCRATCH
from hf_cifar.config.objects import MEMORY
from hf_cifar.errors import UserError
from hf_cifar.evaluation.mistakes import confused_pairs
from hf_cifar.evaluation.tables import render_cell, render_number
from hf_cifar.hub.endpoint import HANDLER
from hf_cifar.hub.origin import HUB
from hf_cifar.models.names import ARTICLE_NAMES
from hf_cifar.models.rejection import Rejection, rejection_in
from hf_cifar.report.public import public_options
from hf_cifar.report.wording import (
    hashed,
    license_note,
    render_doubted,
    render_energy,
    render_leakage,
    render_prior,
    render_procedure,
    render_skipped,
    render_stored,
    role_of,
    validation_source,
)
from hf_cifar.runs.folder import RunFolder, write_text
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
    """The facts in a model card.

    repo_id: the repository loaded by the example code. options: from config.yaml. run: from run.json, or the
    part known before training. metrics: by split, as in metrics.json. class_names: in the order of their ids.
    custom_code: the model comes with a Python file. article_model: that is hf_cifar/models/article.py.
    """

    repo_id: str
    options: dict[str, Any]
    run: dict[str, Any]
    metrics: dict[str, dict[str, Any]]
    class_names: list[str]
    custom_code: bool = False
    article_model: bool = False
    module_class: str = ""  # of a torch.nn.Module, which has no config
    rejection: Rejection | None = None  # of a model that answers that an image is of no class


def load_card(folder: Path) -> tuple[CardFacts, str]:
    """Read the facts of a finished run and render its card. Raises: UserError if they are incomplete."""
    files = RunFolder(folder)
    try:
        run, metrics, config = files.facts(), files.metrics(), files.model_config()
        if not metrics:
            raise KeyError(files.metrics_path.name)
        facts = CardFacts(
            repo_id=run["repo_id"],
            options=files.options(),
            run=run,
            metrics=metrics,
            class_names=_class_names(config),
            custom_code=any(path.name != HANDLER.name for path in folder.glob("*.py")),
            article_model=config.get("model_type") in ARTICLE_NAMES,
            module_class=config.get("module_class", ""),
            rejection=rejection_in(config),
        )
        return facts, render_card(facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError,
            jinja2.UndefinedError) as error:  # fmt: skip
        raise UserError(
            f"{folder} has no finished run to make a card from "
            f"({type(error).__name__}: {one_line(error, 200)}); pass the --output_dir of one"
        ) from None


def _class_names(config: dict[str, Any]) -> list[str]:
    """Class names in a saved model's config.json; timm models store them as a list."""
    if "label_names" in config:
        return list(config["label_names"])
    return [config["id2label"][key] for key in sorted(config["id2label"], key=int)]


def render_card(facts: CardFacts) -> str:
    """Render the README.md of a run, metadata and text, without local paths or tokens."""
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
    text = environment.from_string(template.read_text(encoding="utf-8")).render(
        metadata=card_metadata(facts).to_yaml(),
        name=facts.repo_id.split("/")[-1],
        repo_id=facts.repo_id,
        custom_code=facts.custom_code,
        value_range=[f"{end:.10g}" for end in run.get("value_range") or ()],
        article_model=facts.article_model,
        module_class=facts.module_class,
        lora=bool(options.get("lora_rank")),
        image_size=options.get("image_size"),
        base_id=model["hub_id"] or model["name"],
        base_revision=options.get("model_revision"),
        objects=[each["name"] for each in (model, dataset) if each["name"].startswith(MEMORY)],
        base=model["name"],
        from_scratch=model["name"].startswith(SCRATCH),
        dataset=dataset["name"],
        num_labels=len(facts.class_names),
        classes=listed(facts.class_names, MAX_NAMES),
        headline=_headline(metrics),
        results=[_result(split, metrics[split], options, run) for split in reversed(metrics)],
        temperature=_temperature(metrics),
        calibration=_calibration(metrics),
        rejection=facts.rejection,
        kept=[
            (split, *(render_cell(own, name) for name in ("kept", "accuracy_kept", "accuracy")))
            for split, own in reversed(metrics.items())
            if "kept" in own
        ],
        per_class=_per_class(last),
        per_class_note=_per_class_note(last_split, last),
        last_split=last_split,
        weaknesses=_weakest(last),
        confused=_confused(last),
        dataset_link=_link(dataset),
        dataset_license=dataset["license_name"] or dataset["license"],
        num_train=f"{run['num_train']:,}",
        stored=render_stored(run),
        num_validation=f"{run['num_validation']:,}",
        validation_source=validation_source(run, options),
        hashed=hashed(options),
        skipped=render_skipped(run, metrics),
        doubted=render_doubted(run),
        leakage=render_leakage(run),
        split_hash=run["split_hash"],
        procedure=render_procedure(run, options),
        options=_shown_options(options),
        energy=render_energy(run.get("energy")),
        measured_on=" and ".join(metrics) or "validation",
        prior=render_prior(options, run, _temperature(metrics)),
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
    """The card's metadata for the Hub: origin, licence, task, and each split's accuracy as a model-index."""
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
            metric_value=round(own["accuracy"], 6),
        )
        for split, own in facts.metrics.items()
        if "accuracy" in own
    ]
    return ModelCardData(
        model_name=facts.repo_id.split("/")[-1],
        license=model["license"],
        license_name=model["license_name"],
        license_link=model["license_link"],
        library_name="pytorch" if facts.module_class else "transformers",
        pipeline_tag="image-classification",
        tags=[
            "image-classification",
            "hf-cifar",
            *(["lora"] if facts.options.get("lora_rank") else []),
        ],
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=[dataset["hub_id"]] if dataset["hub_id"] else None,
        metrics=["accuracy"],
        eval_results=results or None,
    )


def render_eval_results(facts: CardFacts) -> str | None:
    """Render the test accuracy as YAML for the Hub's `.eval_results/`; None unless it was measured on the
    whole test split of a data set on the Hub."""
    dataset, metrics = facts.run["dataset"], facts.metrics.get("test", {})
    part = facts.options.get("max_eval_samples") or "skipped_rows" in metrics
    if not dataset["hub_id"] or "accuracy" not in metrics or part:
        return None
    value, interval = metrics["accuracy"], metrics.get("intervals", {}).get("accuracy")
    between = f", 95% interval {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
    entry = EvalResultEntry(
        dataset_id=dataset["hub_id"],
        task_id=facts.options.get("dataset_config_name") or "default",
        value=round(value, 6),
        notes=f"accuracy, 0 to 1, of {metrics['num_images']:,} images{between}",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def save_card(folder: Path) -> None:
    """Write README.md and `.eval_results/` of a finished run from its other files."""
    (facts, text), files = load_card(folder), RunFolder(folder)
    write_text(files.card_path, text)
    results = render_eval_results(facts)
    if results is not None:
        path = files.eval_results_path(facts.run["dataset"]["hub_id"].split("/")[-1])
        path.parent.mkdir(exist_ok=True)
        write_text(path, results)


def is_untouched(folder: Path) -> bool:
    """True if a run's card is the one that `save_card` writes for the current metrics."""
    card = RunFolder(folder).card_path
    try:
        return card.is_file() and card.read_text(encoding="utf-8") == load_card(folder)[1]
    except UserError:
        return False


def card_for(folder: Path, repo_id: str) -> str:
    """Return a run's card for the repository it is pushed to. In an edited card, only the repository in the
    example code changes. Raises: UserError if the folder has no finished run."""
    facts, original = load_card(folder)
    card = RunFolder(folder).card_path
    text = card.read_text(encoding="utf-8") if card.is_file() else original
    if text == original:
        return render_card(dataclasses.replace(facts, repo_id=repo_id))
    return text.replace(f'"{facts.repo_id}"', f'"{repo_id}"')


def _cell(value: Any) -> str:
    """Format a value as a cell of a Markdown table."""
    return one_line(value).replace("|", "\\|")


def _code(value: str) -> str:
    return f"`{value.replace('`', '')}`"


def _headline(metrics: dict[str, dict[str, Any]]) -> str:
    split = next(
        (name for name in ("test", "validation") if "accuracy" in metrics.get(name, {})), None
    )
    if split is None:
        return ""
    own = metrics[split]
    return f"Accuracy on {split}: {render_cell(own, 'accuracy')}, on {own['num_images']:,} images"


def _result(
    split: str, metrics: dict[str, Any], options: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any]:
    rows = []
    for name in shown("headline", metrics):
        interval = metrics.get("intervals", {}).get(name)
        between = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "-"
        rows.append((name, render_number(metrics[name]), between))
    role = role_of(split, metrics, options, run)
    return {"name": split, "num_images": f"{metrics['num_images']:,}", "role": role, "rows": rows}


def _temperature(metrics: dict[str, dict[str, Any]]) -> str:
    found = [own["temperature"] for own in metrics.values() if "temperature" in own]
    return f"{found[-1]:.3f}" if found else ""


def _calibration(metrics: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (split, name, render_number(own[f"{name}{UNCALIBRATED}"]), render_number(own[name]))
        for split, own in reversed(metrics.items())
        for name in ("ece", "cross_entropy")
        if f"{name}{UNCALIBRATED}" in own
    ]


def _ranked(metrics: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Classes that have images, the lowest F1 first."""
    classes = [
        (name, own) for name, own in metrics.get("per_class", {}).items() if own["num_images"]
    ]
    return sorted(classes, key=lambda item: item[1]["f1"])


def _per_class(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    classes = list(metrics.get("per_class", {}).items())
    if len(classes) > MAX_CLASSES:
        classes = _ranked(metrics)[:MAX_CLASSES]
    intervals = metrics.get("intervals", {}).get("per_class", {})
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


def _per_class_note(split: str, metrics: dict[str, Any]) -> str:
    count = len(metrics.get("per_class", {}))
    if count > MAX_CLASSES:
        shown = f"the {MAX_CLASSES} of {count:,} classes with the lowest F1"
        return f"On {split}, {shown}; in brackets: 95% intervals."
    return f"On {split}; in brackets: 95% intervals."


def _weakest(metrics: dict[str, Any]) -> str:
    return ", ".join(
        f"{one_line(name)} ({render_number(own['f1'])})"
        for name, own in _ranked(metrics)[:NUM_WEAKEST]
        if own["f1"] < 1
    )


def _confused(metrics: dict[str, Any]) -> list[tuple[str, ...]] | None:
    if "confusion_matrix" not in metrics:  # multi-label
        return None
    pairs = confused_pairs(metrics["confusion_matrix"], list(metrics["per_class"]), NUM_PAIRS)
    return [
        (pair["truth"], pair["prediction"], f"{pair['num_images']:,}", f"{pair['share']:.1%}")
        for pair in pairs
    ]


def _link(dataset: dict[str, Any]) -> str:
    name = dataset["name"]
    return f"[{name}]({HUB}/datasets/{dataset['hub_id']})" if dataset["hub_id"] else _code(name)


def _shown_options(options: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f"`{name}`", _code(str(value))) for name, value in public_options(options).items()]
