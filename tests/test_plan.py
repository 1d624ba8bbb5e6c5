"""hf_cifar.plan: options that are left open, settled by the data, the model and the machine."""

import pytest
import torch
from tiny import tiny_config

from hf_cifar import RunConfig, finetune_classifier, load_splits
from hf_cifar.data.labels import class_counts
from hf_cifar.errors import UserError
from hf_cifar.plan import images_an_epoch, settle_epochs
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.processes import Processes


@pytest.mark.parametrize(
    ("num_images", "options", "epochs"),
    [
        (45_000, {}, 3),
        (5_333, {}, 3),  # 167 steps an epoch
        (5_312, {}, 4),  # 166
        (1_080, {}, 15),
        (60, {}, 30),
        (1_080, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 15),
        (60, {"num_train_epochs": 2.5}, 2.5),
        (1_080, {"freeze": "backbone"}, 3),  # 34 steps an epoch
        (300, {"freeze": "backbone"}, 10),
    ],
)
def test_few_images_are_trained_on_for_more_epochs(num_images, options, epochs):
    processes = Processes(0, 1, torch.device("cpu"))
    config = RunConfig().with_options(**options)
    assert settle_epochs(config, num_images, processes) == epochs


def test_settled_options_are_saved_and_logged(tmp_path, stripes, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    finetune_classifier(
        "scratch/article_mlp", str(stripes), optim="sgd", use_cpu=True, disable_tqdm=True,
        save_strategy="no", eval_strategy="no", output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    train = RunFolder(tmp_path / "run").load_config().train
    assert (train.num_train_epochs, train.weight_decay) == (30, 0.0005)
    num_train = RunFolder(tmp_path / "run").facts()["num_train"]
    assert f"training for 30 epochs, {30 * -(-num_train // 32)} steps, because" in caplog.text


@pytest.mark.parametrize("balance", ["undersample", "oversample"])
def test_the_number_of_epochs_is_for_the_images_that_are_drawn(balance, tmp_path, stripes, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    config = tiny_config(
        tmp_path / "run", stripes, "scratch/article_mlp", "--imbalance_factor", "8",
        "--class_balance", balance,
    )  # fmt: skip
    train = load_splits(config.data).train
    counts = class_counts(train.labels, 2)
    drawn = images_an_epoch(train, config.train)
    assert drawn == 2 * (counts.min() if balance == "undersample" else counts.max())
    assert (
        f"--class_balance {balance}: an epoch has {drawn} images, {drawn // 2} of each"
        in caplog.text
    )


def test_data_that_cannot_be_balanced_are_refused_before_images_are_read(tmp_path, lights, shards):
    for data, flags, kind in [
        (lights, [], "multi-label data"),
        (shards, ["--streaming", "--max_eval_samples", "8"], "a stream, whose classes are not"),
    ]:
        config = tiny_config(
            tmp_path / "run", data, "scratch/article_mlp", "--class_balance", "oversample", *flags
        )
        with pytest.raises(UserError, match=f"--class_balance oversample is not for {kind}"):
            finetune_classifier(config)
