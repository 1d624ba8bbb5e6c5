"""hf_cifar.training.cleaning: planted wrong labels are left out of training, and nothing else changes."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config

from hf_cifar import build_model, finetune_classifier, load_splits, plan_run, reproduce_run
from hf_cifar.config.data import DataConfig
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from hf_cifar.evaluate import evaluate_saved
from hf_cifar.finetune import prepare_images
from hf_cifar.report.page import write_report
from hf_cifar.training.cleaning import FOLDS, announce, checked_folds, clean_labels

CNN = ["--image_size", "32", "--num_train_epochs", "6", "--learning_rate", "2e-3"]
STEPS = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2"]
STEPS += ["--save_total_limit", "9", "--load_best_model_at_end", "false"]


def drawn(count, seed):
    """Stripes across or down, [N, 16, 16, 3] uint8, and their classes."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 60, (count, 16, 16, 3))
    labels = np.arange(count) % 2
    for image, label in zip(images, labels, strict=True):
        lines = (np.arange(16) + generator.integers(0, 4)) // 2 % 2 == 0
        image[(lines, slice(None))[:: 1 if label else -1]] += 180
    return images.astype(np.uint8), labels


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A data set with 40 wrong labels among 200 for training, and the row numbers of the wrong ones."""
    images, labels = drawn(200, 0)
    wrong = np.sort(np.random.default_rng(1).choice(200, 40, replace=False))
    labels[wrong] = 1 - labels[wrong]
    return {"train": (images, labels), "validation": drawn(30, 2)}, wrong


def run(folder, data, model, *flags):
    config = tiny_config(folder, "unused", model, "--clean_labels", "drop", *flags)
    return finetune_classifier(config.with_options(dataset_name=data))


def cleaned(folder, data, model, *flags):
    """The model, its weights before, and the splits, before and after cleaning."""
    config = tiny_config(folder, "unused", model, "--clean_labels", "drop", *flags)
    config = config.with_options(dataset_name=data)
    source = DataSource(config.data)
    torch.manual_seed(0)
    model, processor = build_model(config.model, source.splits.id2label)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_run(config, model, processor, source.splits)
    splits, _ = prepare_images(source, processor, plan)
    state = torch.get_rng_state()
    after = clean_labels(model, processor, splits, plan)
    assert torch.equal(torch.get_rng_state(), state)
    return model, before, splits, after


def quality(doubted, wrong):
    """Precision and recall of the doubted rows."""
    found = len(np.intersect1d(doubted, wrong))
    return found / len(doubted), found / len(wrong)


@pytest.mark.parametrize("path", ["heads", "trainings"])
def test_planted_errors_are_left_out(path, tmp_path, planted, tiny_vit, caplog):
    data, wrong = planted
    model, flags = (tiny_vit, []) if path == "heads" else ("scratch/article_cnn", CNN)
    caplog.set_level(logging.INFO)
    model, before, splits, after = cleaned(tmp_path / "run", data, model, *flags)
    doubted = after.train.doubted
    precision, recall = quality(doubted[:, 0], wrong)
    assert precision > 0.8 and recall > 0.6
    assert np.array_equal(after.train.row_ids, np.setdiff1d(np.arange(200), doubted[:, 0]))
    assert np.array_equal(doubted[:, 1], splits.train.labels[doubted[:, 0]])
    assert np.array_equal(doubted[:, 2], 1 - doubted[:, 1])
    assert after.validation is splits.validation
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert f"{FOLDS} linear heads" in caplog.text or f"{FOLDS} models" in caplog.text
    assert f"{len(doubted)} of 200 training images" in caplog.text
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_the_run_is_that_of_a_data_set_without_the_rows(tmp_path, planted, tiny_vit):
    data, _ = planted
    result = run(tmp_path / "cleaned", data, tiny_vit)
    facts = json.loads((tmp_path / "cleaned" / "run.json").read_text())
    found = facts["doubted_rows"]
    assert (
        found["num_rows"] == len(found["row_ids"]) == sum(c["num_rows"] for c in found["changes"])
    )
    assert found["share"] == found["num_rows"] / 200
    assert (
        facts["num_train"]
        == sum(facts["label_counts"]["train"].values())
        == 200 - found["num_rows"]
    )
    kept = np.setdiff1d(np.arange(200), found["row_ids"])
    images, labels = data["train"]
    others = {**data, "train": (images[kept], labels[kept])}
    config = tiny_config(tmp_path / "plain", "unused", tiny_vit)
    plain = finetune_classifier(config.with_options(dataset_name=others))
    weights = plain.model.state_dict()
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    card = (tmp_path / "cleaned" / "README.md").read_text()
    line = f"Left out of training (`--clean_labels`): {found['num_rows']} of 200 training images"
    assert line in card
    assert "clean_labels`): " not in (tmp_path / "plain" / "README.md").read_text()
    page = write_report(tmp_path / "cleaned", dataset=data).read_text()
    assert "Left out of training by <code>--clean_labels</code>" in page


@pytest.mark.parametrize("path", ["heads", "trainings"])
def test_a_resumed_run_has_the_same_rows_and_bits(
    path, tmp_path, planted, tiny_vit, pixel_cache, caplog
):
    """Also with an empty cache: the checkpoint has the rows."""
    data, _ = planted
    model, flags = (tiny_vit, STEPS) if path == "heads" else ("scratch/article_cnn", [*CNN, *STEPS])
    complete = run(tmp_path / "run", data, model, *flags)
    rows = json.loads((tmp_path / "run" / "run.json").read_text())["doubted_rows"]
    weights = {name: value.clone() for name, value in complete.model.state_dict().items()}
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    shutil.rmtree(pixel_cache)
    caplog.clear()
    caplog.set_level(logging.INFO)
    resumed = run(tmp_path / "run", data, model, *flags, "--resume_from_checkpoint", "last")
    assert "predicting each of" not in caplog.text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["doubted_rows"] == rows
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_run_without_its_doubted_rows_is_reproduced_and_known_by_its_data(
    tmp_path, planted, tiny_vit, caplog
):
    """The recorded pixels are those of the rows that were trained on."""
    images, labels = planted[0]["train"]
    data = tmp_path / "data"
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (data / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(data / str(label) / f"{number:03}.png")
    flags = ["--clean_labels", "drop", "--num_train_epochs", "1", "--train_val_split", "0.2"]
    finetune_classifier(tiny_config(tmp_path / "run", data, tiny_vit, *flags))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["doubted_rows"]["num_rows"]
    found = reproduce_run(tmp_path / "run", tmp_path / "again")
    assert found["changed"] == {} and found["weights"]["identical"]
    moved = shutil.copytree(data, tmp_path / "moved")
    config = EvaluateConfig(
        model_name_or_path=str(tmp_path / "run"), output_dir=str(tmp_path / "out"), use_cpu=True
    )
    caplog.set_level(logging.INFO)
    evaluate_saved(config, DataConfig(dataset_name=str(moved)))
    assert "moved holds the data of the run: only its validation images" in caplog.text


def test_predictions_come_from_the_cache_and_are_the_same_without_it(
    tmp_path, planted, pixel_cache, caplog
):
    data, _ = planted
    caplog.set_level(logging.INFO)
    found = []
    for count in (FOLDS, 0, FOLDS):
        caplog.clear()
        found.append(cleaned(tmp_path / "run", data, "scratch/article_cnn", *CNN)[3].train.doubted)
        assert caplog.text.count("--clean_labels: training") == count
        if not count:
            shutil.rmtree(pixel_cache)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    caplog.clear()
    cleaned(tmp_path / "run", data, "scratch/article_cnn", *CNN, "--num_train_epochs", "1")
    assert caplog.text.count("--clean_labels: training") == FOLDS  # other models


def test_folds_are_stratified_and_small_classes_are_not_checked(tmp_path, caplog):
    images, _ = drawn(53, 0)
    labels = np.repeat([0, 1, 2], [30, 20, 3])
    config = tiny_config(tmp_path, "unused", "unused").with_options(
        dataset_name={"train": (images, labels), "validation": (images, labels)}
    )
    train = load_splits(config.data).train
    caplog.set_level(logging.INFO)
    fold_of = checked_folds(train, seed=0)
    for label, count in ((0, 30), (1, 20)):
        folds = fold_of[train.labels == label]
        assert np.bincount(folds).tolist() == [count // FOLDS] * FOLDS
    assert (fold_of[train.labels == 2] == -1).all()
    assert "1 of 3 classes have fewer than 5 training images, and are not checked: 2" in caplog.text
    assert not np.array_equal(fold_of, checked_folds(train, seed=1))


def test_a_class_that_loses_most_of_its_images_is_named(tmp_path, caplog):
    images, _ = drawn(53, 0)
    labels = np.repeat([0, 1, 2], [30, 17, 6])
    config = tiny_config(tmp_path, "unused", "unused").with_options(
        dataset_name={"train": (images, labels), "validation": (images, labels)}
    )
    train = load_splits(config.data).train
    rare, common = (np.flatnonzero(train.labels == label) for label in (2, 1))
    doubted = [(train.row_ids[row], train.labels[row], 0) for row in (*rare[:4], *common[:8])]
    announce(np.array(doubted), train, "drop")
    assert "these classes lose more than half of their images: 2 (4 of 6); rare" in caplog.text


def test_a_small_class_keeps_its_rows(tmp_path, planted, tiny_vit):
    (images, labels), validation = planted[0]["train"], planted[0]["validation"]
    labels = labels.copy()
    labels[:4] = 2
    data = {"train": (images, labels), "validation": validation}
    after = cleaned(tmp_path / "run", data, tiny_vit)[3]
    assert (after.train.labels == 2).sum() == 4
    assert len(after.train.doubted) and 2 not in after.train.doubted[:, 1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--streaming", "--max_eval_samples", "8"], "a stream is not read in advance"),
        (["--check_images", "used"], "leave out --check_images used"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "trains models without evaluations"),
        (["--lr_scheduler_type", "greedy"], "which --lr_scheduler_type greedy needs"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(flags, message, tmp_path, shards, tiny_vit):
    config = tiny_config(tmp_path / "run", shards, tiny_vit, "--clean_labels", "drop", *flags)
    with pytest.raises(UserError, match=message) as error:
        finetune_classifier(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_multi_label_data_is_refused(tmp_path, lights, tiny_vit):
    config = tiny_config(tmp_path / "run", lights, tiny_vit, "--clean_labels", "drop")
    with pytest.raises(UserError, match="needs one label per image"):
        finetune_classifier(config)
