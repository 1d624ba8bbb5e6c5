"""Tiny runs, which take a second or two on a CPU. Later flags replace earlier ones."""

import torch

from hf_cifar import (
    RunConfig,
    build_model,
    build_trainer,
    finetune_classifier,
    load_splits,
    plan_run,
)


def tiny_options(folder, data, model, *flags):
    """Command line options of a run of two epochs."""
    return [
        "--dataset_name", str(data), "--model_name_or_path", str(model), "--output_dir", str(folder),
        "--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "8",
        "--learning_rate", "5e-3", "--num_train_epochs", "2", *flags,
    ]  # fmt: skip


def tiny_config(folder, data, model, *flags):
    return RunConfig.parse(tiny_options(folder, data, model, *flags))


def tiny_trainer(folder, data, model, *flags):
    """The Trainer of a run; the same weights each time."""
    config = tiny_config(folder, data, model, *flags)
    splits = load_splits(config.data)
    torch.manual_seed(0)
    model, processor = build_model(config.model, splits.id2label, multi_label=splits.multi_label)
    return build_trainer(model, processor, splits, plan_run(config, model, processor, splits))


def tiny_run(folder, data, model, *flags):
    return finetune_classifier(tiny_config(folder, data, model, *flags))
