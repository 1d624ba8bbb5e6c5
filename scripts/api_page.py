"""Write docs/api.md, the page of the public names: run after a signature, docstring or example changes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import hf_cifar

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
WIDTH = 88
START = """# Python interface

The public names of `hf_cifar`. Each is imported on first use; `import hf_cifar` alone loads no torch.
The examples are one session, in which later ones use the variables of earlier ones. This page is written by
`scripts/api_page.py`.
"""
# By section, every public name and an example of it. One session of doctest, in an empty folder.
EXAMPLES = {
    "Options": {
        "DataConfig": """
>>> import hf_cifar
>>> data = hf_cifar.DataConfig(
...     dataset_name="bundled/digits", max_train_samples=400, max_eval_samples=100
... )
""",
        "AugmentConfig": """
>>> augment = hf_cifar.AugmentConfig(flip=0.0, crop_padding=0.125)
""",
        "ModelConfig": """
>>> model = hf_cifar.ModelConfig(model_name_or_path="scratch/article_mlp")
""",
        "TrainingConfig": """
>>> training = hf_cifar.TrainingConfig(
...     output_dir="digits", num_train_epochs=4, learning_rate=0.01, precision="fp32", use_cpu=True
... )
""",
        "RunConfig": """
>>> config = hf_cifar.RunConfig(data, augment, model, training)
>>> hf_cifar.RunConfig.parse(["--dataset_name", "bundled/digits", "--flip", "0"]).augment.flip
0.0
""",
        "EvaluateConfig": """
>>> on_test = hf_cifar.EvaluateConfig(model_name_or_path="digits", split="test", use_cpu=True)
""",
        "ReportConfig": """
>>> small = hf_cifar.ReportConfig(gallery_size=4)
""",
        "PredictConfig": """
>>> three_best = hf_cifar.PredictConfig(model_name_or_path="digits", top_k=3, use_cpu=True)
""",
        "ExportConfig": """
>>> as_onnx = hf_cifar.ExportConfig(output="digits.onnx")
""",
    },
    "Data and models": {
        "load_splits": """
>>> splits = hf_cifar.load_splits(data)
>>> len(splits.train), len(splits.validation), splits.id2label[3]
(400, 100, '3')
""",
        "load_test_split": """
>>> test = hf_cifar.load_test_split(data)
>>> len(test), test.name
(100, 'test')
""",
        "build_model": """
>>> network, image_processor = hf_cifar.build_model(model, splits.id2label)
>>> network.config.num_labels
10
""",
    },
    "Fine-tuning": {
        "finetune_classifier": """
>>> result = hf_cifar.finetune_classifier(config)
epoch 1.00: validation accuracy ...
>>> result.metrics["validation"]["accuracy"] > 0.5
True
>>> result.output_dir.name
'digits'
""",
        "plan_run": """
>>> from dataclasses import replace
>>> alone = replace(config, train=replace(training, output_dir="by-hand"))
>>> plan = hf_cifar.plan_run(alone, network, image_processor, splits)
>>> plan.config.train.metric_for_best_model
'accuracy'
""",
        "build_trainer": """
>>> trainer = hf_cifar.build_trainer(network, image_processor, splits, plan)
>>> trainer.train().global_step
epoch 1.00: validation accuracy ...
52
""",
        "ImageClassificationTrainer": """
>>> from transformers import TrainingArguments
>>> by_itself = hf_cifar.ImageClassificationTrainer(
...     model=network,
...     args=TrainingArguments("by-itself", max_steps=20, use_cpu=True, disable_tqdm=True),
...     train_dataset=splits.train,  # or a datasets.Dataset
...     eval_dataset=splits.validation,
... )
>>> by_itself.train().global_step
20
>>> by_itself.evaluate()["eval_accuracy"] > 0.5
epoch ...
True
""",
        "load_classifier": """
>>> network, image_processor = hf_cifar.load_classifier("digits")
>>> network.config.id2label[3]
'3'
""",
        "finetune_seeds": """
>>> series = replace(config, train=replace(training, output_dir="seeds", seeds=2))
>>> summary = hf_cifar.finetune_seeds(series)
epoch 1.00: validation accuracy ...
>>> summary["seeds"]
[42, 43]
""",
        "reproduce_run": """
>>> comparison = hf_cifar.reproduce_run("digits", "again")
epoch 1.00: validation accuracy ...
>>> comparison["weights"]["identical"]
True
""",
    },
    "Evaluation and prediction": {
        "evaluate_classifier": """
>>> predictions = hf_cifar.evaluate_classifier(trainer, splits.validation)
>>> predictions.logits.shape
(100, 10)
""",
        "evaluate_saved": """
>>> predictions = hf_cifar.evaluate_saved(on_test, data)
>>> predictions.metrics["num_images"]
100
""",
        "Predictions": """
>>> predictions = hf_cifar.Predictions.load("digits", "validation")
>>> mistakes = predictions.row_ids[~predictions.correct]
>>> len(mistakes) < 50
True
""",
        "compute_metrics": """
>>> import numpy as np
>>> logits = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
>>> labels = np.array([0, 0, 1, 1])
>>> hf_cifar.compute_metrics(logits, labels, {0: "cat", 1: "dog"})["accuracy"]
0.75
""",
        "metric_intervals": """
>>> low, high = hf_cifar.metric_intervals(logits, labels, {0: "cat", 1: "dog"})["accuracy"]
>>> low < 0.75 < high
True
""",
        "compare_runs": """
>>> comparison = hf_cifar.compare_runs(["seeds/seed-42", "seeds/seed-43"])
>>> comparison["split"], comparison["num_images"]
('validation', 100)
""",
        "build_report": """
>>> report = hf_cifar.build_report("digits", small)
>>> row = report.facts["least_confident_hits"][0]
>>> report.pictures[row["picture"]].shape
(8, 8, 3)
""",
        "write_report": """
>>> hf_cifar.write_report("digits", small).name
'report.html'
""",
        "predict_files": """
>>> from PIL import Image
>>> Image.fromarray(splits.validation.decode(0)).save("image.png")
>>> for record in hf_cifar.predict_files(three_best, ["image.png"]):
...     print(record["path"], len(record["top_k"]))
image.png 3
""",
        "Preprocessor": """
>>> preprocessor = hf_cifar.Preprocessor.of(network, image_processor)
>>> preprocessor(["image.png"]).shape
torch.Size([1, 3, 32, 32])
""",
        "export_run": """
>>> hf_cifar.export_run("digits", as_onnx)["batches"]["64"]["same_top1"]
100
""",
    },
    "Errors": {
        "UserError": """
>>> try:
...     hf_cifar.load_splits(hf_cifar.DataConfig(dataset_name="./nowhere"))
... except hf_cifar.UserError as error:
...     print(error)
no data set ./nowhere: there is no such file or folder
""",
    },
}


def render_page() -> str:
    """Return docs/api.md."""
    parts = [START]
    for section, examples in EXAMPLES.items():
        parts.append(f"## {section}\n")
        for name, example in examples.items():
            parts += [f"### {name}\n", describe(name, getattr(hf_cifar, name))]
            parts.append(f"```python\n{example.strip()}\n```\n")
    return "\n".join(parts)


def describe(name: str, value: Any) -> str:
    """Signature and docstring of one name, and the public methods of a class."""
    parts = []
    if is_class_of_options(value):
        parts.append(f"```python\nhf_cifar.{name}(**options)\n```\n\n{paragraphs(value)}\n")
        parts.append("Its fields are options of the command line.\n")
    elif inspect.isclass(value) and issubclass(value, Exception):
        parts.append(f"{paragraphs(value)}\n")
    else:
        signature = render_signature(f"hf_cifar.{name}", value)
        parts.append(f"```python\n{signature}\n```\n\n{paragraphs(value)}\n")
    if inspect.isclass(value):
        rows = [f"- `{label}`: {summary}" for label, summary in public_members(value)]
        parts += ["\n".join(rows) + "\n"] if rows else []
    return "\n".join(parts)


def paragraphs(value: Any) -> str:
    """Return a docstring, with a paragraph of its own for what it raises."""
    return re.sub(r"\n+Raises:", "\n\nRaises:", inspect.getdoc(value) or "")


def is_class_of_options(value: Any) -> bool:
    """Return True for a dataclass whose fields are options of a command line, each with a help text."""
    return dataclasses.is_dataclass(value) and all(
        "help" in field.metadata for field in dataclasses.fields(value)
    )


def public_members(value: type) -> list[tuple[str, str]]:
    """Public methods and properties that a class itself defines, with the first sentence of each."""
    found = []
    for name, member in vars(value).items():
        if name.startswith("_"):
            continue
        if isinstance(member, (classmethod, staticmethod)):
            member = member.__func__
        if inspect.isfunction(member):
            label = render_signature(name, member, wrap=False)
        elif isinstance(member, (property, functools.cached_property)):
            label = name
        else:
            continue
        paragraph = (inspect.getdoc(member) or "").split("\n\n")[0]
        found.append((label, " ".join(paragraph.split()).removesuffix(".")))
    return found


def render_signature(name: str, value: Any, *, wrap: bool = True) -> str:
    """A call as its definition reads, one parameter a line where it is long."""
    signature = inspect.signature(value)
    parameters, is_named = [], False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not is_named:
            parameters.append("*")
            is_named = True
        parameters.append(render_parameter(parameter))
    returned = signature.return_annotation
    arrow = "" if returned in (inspect.Signature.empty, None, "None") else f" -> {returned}"
    line = f"{name}({', '.join(parameters)}){arrow}"
    if not wrap or len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {each},\n" for each in parameters) + f"){arrow}"


def render_parameter(parameter: inspect.Parameter) -> str:
    """A parameter with its type and default."""
    stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
    text = f"{stars}{parameter.name}: {parameter.annotation}"
    if parameter.default is inspect.Parameter.empty:
        return text
    default = repr(parameter.default).replace("'", '"')
    return f"{text} = {'...' if default == '<factory>' else default}"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
