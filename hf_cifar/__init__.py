"""Fine-tune pretrained image classifiers: fast, honest, and plain Transformers at the end."""

from __future__ import annotations

import importlib
from typing import Any

# Public names and where they live; imported when first used, so that `import hf_cifar` loads no torch.
_PUBLIC = {
    "AugmentConfig": "hf_cifar.config.augmentation",
    "DataConfig": "hf_cifar.config.data",
    "EvaluateConfig": "hf_cifar.config.evaluation",
    "ExportConfig": "hf_cifar.config.deployment",
    "ImageClassificationTrainer": "hf_cifar.training.trainer",
    "ModelConfig": "hf_cifar.config.model",
    "PredictConfig": "hf_cifar.config.deployment",
    "Predictions": "hf_cifar.evaluation.predictions",
    "Preprocessor": "hf_cifar.preprocessor",
    "ReportConfig": "hf_cifar.config.evaluation",
    "RunConfig": "hf_cifar.config.run",
    "TrainingConfig": "hf_cifar.config.training",
    "UserError": "hf_cifar.errors",
    "build_model": "hf_cifar.models.build",
    "build_report": "hf_cifar.report.facts",
    "build_trainer": "hf_cifar.training.build",
    "compare_runs": "hf_cifar.evaluation.comparison",
    "compute_metrics": "hf_cifar.evaluation.predictions",
    "evaluate_classifier": "hf_cifar.evaluate",
    "evaluate_saved": "hf_cifar.evaluate",
    "export_run": "hf_cifar.deploy.export",
    "finetune_classifier": "hf_cifar.finetune",
    "finetune_seeds": "hf_cifar.studies.seeds",
    "load_classifier": "hf_cifar.models.build",
    "load_splits": "hf_cifar.data.splits",
    "load_test_split": "hf_cifar.data.splits",
    "metric_intervals": "hf_cifar.evaluation.predictions",
    "plan_run": "hf_cifar.plan",
    "predict_files": "hf_cifar.predict",
    "reproduce_run": "hf_cifar.studies.reproduce",
    "write_report": "hf_cifar.report.page",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_cifar' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
