"""The model card of a Trainer that is used by itself: what is known without the folder of a run."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData
from transformers import PreTrainedModel, Trainer

from hf_cifar.config.metrics import words
from hf_cifar.hub.origin import Origin, find_origin
from hf_cifar.text import listed
from hf_cifar.training.optimizers import optimizer_name

MARKER = (
    "<!-- Written by ImageClassificationTrainer; without this line, the card is kept as it is. -->"
)
MAX_NAMES = 20  # in a sentence
TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def write_card(trainer: Trainer, measured: dict[str, float] | None, **given: Any) -> None:
    """Write README.md into the output folder, unless the one there was edited.

    measured: metrics of the current model on its own evaluation data; default: those logged in training.
    given: what the caller knows, named as in `Trainer.create_model_card`.
    """
    path = Path(trainer.args.output_dir, "README.md")
    if path.is_file() and MARKER not in path.read_text(encoding="utf-8"):
        return
    path.write_text(render_card(trainer, measured, **given), encoding="utf-8")


def render_card(trainer: Trainer, measured: dict[str, float] | None, **given: Any) -> str:
    """Render the metadata and text of the card, without local paths."""
    args, state = trainer.args, trainer.state
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    base = base_of(model, given.get("finetuned_from"))
    name = given.get("model_name") or Path(args.output_dir).resolve().name
    classes = [model.config.id2label[i] for i in range(model.config.num_labels)]
    chose = bool(args.load_best_model_at_end and state.best_global_step)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_cifar"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    dataset = given.get("dataset") or given.get("dataset_tags")
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return environment.get_template("trainer_card.md").render(
        metadata=card_metadata(base, model.config.model_type, **given),
        marker=MARKER,
        name=name,
        repo_id=trainer.hub_model_id or name,
        model=type(model).__name__,
        module_class=model.config.to_dict().get("module_class", ""),
        base=base.name if base else None,
        num_labels=len(classes),
        classes=listed(classes, MAX_NAMES),
        metrics=shown_metrics(measured or metrics_of_training(trainer, chose=chose)),
        num_evaluated=f"{num_images(trainer.eval_dataset):,}",
        chose=chose,
        num_train=f"{len(trainer.train_dataset):,}" if trainer.train_dataset else None,
        dataset=", ".join(dataset) if isinstance(dataset, list) else dataset,
        steps=f"{state.global_step:,}",
        epochs=f"{state.epoch or 0:g}",
        batch=f"{batch:,}",
        optimizer=optimizer_name(args),
        schedule=getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        args=args,
        versions={
            package: metadata.version(package) for package in ("hf_cifar", "transformers", "torch")
        },
    )


def base_of(model: PreTrainedModel, given: str | None) -> Origin | None:
    """Return the origin of the checkpoint that a model was loaded from, if there is one."""
    name = given or model.name_or_path
    return find_origin(name, "model") if name else None


def card_metadata(base: Origin | None, model_type: str, **given: Any) -> str:
    """Return the card's metadata as YAML."""
    tags = given.get("tags") or []
    datasets = given.get("dataset_tags") or []
    return ModelCardData(
        language=given.get("language"),
        license=given.get("license") or (base.license if base else None),
        license_name=base.license_name if base else None,
        license_link=base.license_link if base else None,
        library_name="pytorch" if model_type == "torch_module" else "transformers",
        pipeline_tag="image-classification",
        base_model=base.hub_id if base else None,
        datasets=[datasets] if isinstance(datasets, str) else datasets or None,
        tags=["hf_cifar", *([tags] if isinstance(tags, str) else tags)],
    ).to_yaml()


def metrics_of_training(trainer: Trainer, *, chose: bool) -> dict[str, float]:
    """Return the metrics that the training logged for the model that it ended with."""
    history = trainer.state.log_history
    step = trainer.state.best_global_step if chose else trainer.state.global_step
    found: dict[str, float] = {}
    for record in history:
        if "train_runtime" in record:
            break  # later ones may be of other data
        if record.get("step") == step:
            found |= {key: value for key, value in record.items() if key.startswith("eval_")}
    return found


def shown_metrics(metrics: dict[str, float]) -> dict[str, str]:
    """Name the metrics in words, with four decimals, without times."""
    names = {key: key.removeprefix("eval_") for key in metrics if key.startswith("eval_")}
    return {
        words(name): f"{metrics[key]:.4f}"
        for key, name in names.items()
        if not name.endswith(TIMES) and isinstance(metrics[key], (int, float))
    }


def num_images(evaluation: Any) -> int:
    """Return the number of images of a store, or of stores by name."""
    if isinstance(evaluation, dict):
        return sum(len(store) for store in evaluation.values())
    return 0 if evaluation is None else len(evaluation)
