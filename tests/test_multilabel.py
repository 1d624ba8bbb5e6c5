"""Multi-label data end to end, where they differ from single-label data."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, List, Value, load_from_disk
from PIL import Image
from tiny import tiny_config, tiny_run, tiny_trainer
from transformers import AutoModelForImageClassification, pipeline

from hf_cifar import (
    DataConfig,
    EvaluateConfig,
    PredictConfig,
    RunConfig,
    UserError,
    evaluate_saved,
    finetune_classifier,
    predict_files,
)
from hf_cifar.cli import main
from hf_cifar.commands.finetune import render_summary
from hf_cifar.config.training import TrainingConfig
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.build import build_model


@pytest.fixture(scope="module")
def finished(tmp_path_factory, lights, tiny_vit):
    folder = tmp_path_factory.mktemp("runs") / "lights"
    flags = ("--num_train_epochs", "8", "--do_predict", "--train_val_split", "0.2")
    return finetune_classifier(tiny_config(folder, lights, tiny_vit, *flags))


@pytest.fixture(scope="module")
def photos(tmp_path_factory, lights):
    """Write the test images to files; returns their labels too."""
    folder = tmp_path_factory.mktemp("photos")
    rows = load_from_disk(str(lights))["test"]
    for i, photo in enumerate(rows["photo"]):
        photo.save(folder / f"{i:02}.png")
    return sorted(folder.iterdir()), rows["lights"][:]


def test_the_run_learns_and_leaves_a_multi_label_model(finished):
    found = finished.metrics["test"]
    assert found["accuracy"] > 0.9 and found["average_precision_macro"] > 0.98
    config = json.loads((finished.output_dir / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["id2label"] == {"0": "r", "1": "g", "2": "b"}
    thresholds = [one["threshold"] for one in found["per_class"].values()]
    assert config["thresholds"] == thresholds and set(thresholds) != {0.5}
    saved = json.loads((finished.output_dir / "metrics.json").read_text())
    assert saved == finished.metrics
    run = json.loads((finished.output_dir / "run.json").read_text())
    assert run["temperature"] == 1 and set(run["label_counts"]["train"]) == {"r", "g", "b"}


def test_thresholds_are_fitted_only_on_validation(finished):
    from scipy.special import expit

    from hf_cifar.evaluation.multi_label import fit_thresholds

    validation, test = (Predictions.load(finished.output_dir, s) for s in ("validation", "test"))
    fitted = fit_thresholds(expit(np.float64(validation.logits)), validation.labels)
    np.testing.assert_array_equal(validation.thresholds, fitted)
    np.testing.assert_array_equal(test.thresholds, fitted)


def test_the_best_checkpoint_has_the_highest_map(finished):
    last = max(finished.output_dir.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    areas = [log.get("eval_average_precision_macro", 0) for log in state["log_history"]]
    assert state["best_metric"] == max(areas)
    options = RunConfig.load(finished.output_dir / "config.yaml").train
    assert options.metric_for_best_model == "average_precision_macro"


def test_summary_and_card_show_multi_label_metrics(finished):
    card = (finished.output_dir / "README.md").read_text()
    for text in (render_summary(finished), card):
        words = set(re.findall(r"\w+", text))  # a commit's hash may contain "ece"
        assert {"f1_micro", "average_precision_macro"} <= words and "ece" not in words
    assert "There were no mistakes" not in card


def test_report_shows_multi_label_metrics(finished):
    assert main(["report", str(finished.output_dir), "--gallery_size", "5"]) == 0
    facts = json.loads((finished.output_dir / "report.json").read_text())
    predictions = Predictions.load(finished.output_dir, "test")
    scores = dict(zip(predictions.row_ids.tolist(), predictions.probabilities, strict=True))
    assert facts["multi_label"] and facts["metrics"] == finished.metrics
    assert "reliability" not in facts and len(facts["least_confident_hits"]) == 5
    for row in facts["least_confident_hits"]:
        given = np.isin(list("rgb"), row["truth"].split(", "))
        each = np.where(given, scores[row["row_id"]], 1 - scores[row["row_id"]])
        assert row["prediction"] == row["truth"]
        assert row["confidence"] == pytest.approx(each.prod()) == row["label_probability"]
    page = (finished.output_dir / "report.html").read_text()
    assert "All labels correct on test" in page and "mean average precision" in page
    assert "Validation mean average precision (mAP)" in page and 'src="data:image/png' in page
    assert 'id="calibration"' not in page and "Confusion matrix" not in page


def test_evaluate_reproduces_the_metrics_of_the_run(finished, capsys):
    assert main(["evaluate", "--model_name_or_path", str(finished.output_dir), "--use_cpu"]) == 0
    assert "average_precision_macro" in capsys.readouterr().out
    again = json.loads((finished.output_dir / "metrics.json").read_text())["validation"]
    assert again["f1_macro"] == finished.metrics["validation"]["f1_macro"]


def test_evaluate_refuses_data_with_another_kind_of_labels(finished, lights, tmp_path):
    rows = load_from_disk(str(lights))
    feature = rows["train"].features["lights"].feature
    for split in rows:
        rows[split] = (
            rows[split]
            .remove_columns("lights")
            .add_column("light", [i % 3 for i in range(len(rows[split]))], feature=feature)
        )
    rows.save_to_disk(str(tmp_path / "one"))
    config = EvaluateConfig(model_name_or_path=str(finished.output_dir), split="test", use_cpu=True)
    with pytest.raises(UserError, match="assigns multiple labels, but the data one label"):
        evaluate_saved(config, DataConfig(dataset_name=str(tmp_path / "one")))


def test_evaluate_matches_lists_of_classes_by_name(finished, lights, tmp_path):
    test = load_from_disk(str(lights))["test"]
    words = [["rgb"[i] for i in row] for row in test["lights"]]
    some = [i for i, row in enumerate(words) if "g" not in row]
    turned = List(ClassLabel(names=list("xbgr")))
    ids = [["xbgr".index(name) for name in row] for row in words]
    original = Predictions.load(finished.output_dir, "test")
    for name, column, feature in (("turned", ids, turned), ("words", words, List(Value("string")))):
        rows = test.remove_columns("lights").add_column("labels", column, feature=feature)
        for part in (list(range(len(test))), some):
            folder = tmp_path / f"{name}{len(part)}"
            rows.select(part).save_to_disk(str(folder))
            config = EvaluateConfig(
                model_name_or_path=str(finished.output_dir), split="test", use_cpu=True,
                output_dir=str(tmp_path / "out"),
            )  # fmt: skip
            found = evaluate_saved(config, DataConfig(dataset_name=str(folder)))
            np.testing.assert_array_equal(found.labels, original.labels[part])
            np.testing.assert_allclose(found.logits, original.logits[part], atol=1e-4)
    words[2] = ["r", "violet"]
    rows = test.remove_columns("lights").add_column("labels", words)
    rows.save_to_disk(str(tmp_path / "other"))
    with pytest.raises(
        UserError, match=r"does not know 1 of the \d classes .*'violet' \(1 image\)"
    ):
        evaluate_saved(config, DataConfig(dataset_name=str(tmp_path / "other")))


def test_predict_gives_the_labels_that_reach_their_thresholds(finished, photos):
    paths, _ = photos
    test = Predictions.load(finished.output_dir, "test")
    config = PredictConfig(model_name_or_path=str(finished.output_dir), use_cpu=True, top_k=2)
    for row, record in enumerate(predict_files(config, list(map(str, paths)))):
        scores = 1 / (1 + np.exp(-test.logits[row].astype(np.float64)))
        given = {test.id2label[k] for k in np.flatnonzero(scores >= test.thresholds)}
        assert {one["label"] for one in record["labels"]} == given
        assert len(record["top_k"]) == 2 and "label" not in record
        ranked = [one["score"] for one in record["labels"]]
        assert ranked == sorted(ranked, reverse=True)
        for one in [*record["labels"], *record["top_k"]]:
            assert one["score"] == pytest.approx(scores["rgb".index(one["label"])], abs=2e-3)


def test_an_image_may_get_no_label(finished, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "dark.png")
    config = PredictConfig(model_name_or_path=str(finished.output_dir), use_cpu=True)
    (record,) = predict_files(config, [str(tmp_path / "dark.png")])
    assert record["labels"] == [] and len(record["top_k"]) == 3


def test_pipeline_takes_the_sigmoid(finished, photos):
    paths, _ = photos
    classify = pipeline("image-classification", model=str(finished.output_dir), device="cpu")
    found = {one["label"]: one["score"] for one in classify(str(paths[0]))}
    test = Predictions.load(finished.output_dir, "test")
    wanted = 1 / (1 + np.exp(-test.logits[0]))
    np.testing.assert_allclose([found[name] for name in "rgb"], wanted, atol=2e-3)


def test_thresholds_of_another_number_of_labels_are_refused(finished, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(finished.output_dir)
    model.config.thresholds = [0.5]
    model.save_pretrained(tmp_path)
    from hf_cifar.models.problem_type import thresholds_of

    with pytest.raises(UserError, match="has 1 thresholds for 3 labels"):
        thresholds_of(AutoModelForImageClassification.from_pretrained(tmp_path))


def test_a_run_from_a_multi_label_model_starts_without_its_thresholds(finished, lights, stripes):
    config = tiny_config("unused", lights, finished.output_dir)
    multiple = build_model(config.model, dict(enumerate("rgb")), multi_label=True).model
    assert multiple.config.thresholds is None
    one = build_model(config.model, {0: "across", 1: "down"}).model
    assert one.config.problem_type is None and one.config.thresholds is None


@pytest.mark.parametrize("model", ["scratch/test_efficientnet", "scratch/article_cnn"])
def test_timm_and_article_models_train_on_multiple_labels(tmp_path, lights, model):
    size = () if "article" in model else ("--image_size", "32")
    result = finetune_classifier(
        tiny_config(tmp_path, lights, model, "--num_train_epochs", "4", *size)
    )
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.problem_type == "multi_label_classification"
    assert len(loaded.config.thresholds) == 3
    assert result.metrics["validation"]["average_precision_macro"] > 0.9


def test_without_calibration_every_threshold_is_one_half(tmp_path, lights, tiny_vit):
    flags = ("--num_train_epochs", "1", "--calibrate", "false", "--freeze", "backbone")
    result = finetune_classifier(tiny_config(tmp_path, lights, tiny_vit, *flags))
    per_class = result.metrics["validation"]["per_class"].values()
    assert [own["threshold"] for own in per_class] == [0.5] * 3


def test_loss_is_binary_cross_entropy_smoothed_only_in_training(tmp_path, lights, tiny_vit):
    trainer = tiny_trainer(tmp_path, lights, tiny_vit, "--label_smoothing_factor", "0.2")
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"].float()
    for mode, targets in (
        (False, labels),
        (True, 0.8 * labels + 0.2 * labels.sum(dim=1, keepdim=True) / 3),
    ):
        trainer.model.train(mode)
        inputs = trainer._prepare_inputs(batch)
        loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
        wanted = F.binary_cross_entropy_with_logits(outputs["logits"], targets)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("flag", ["--mixup_alpha", "--cutmix_alpha"])
def test_a_mixed_batch_trains_on_mixed_labels(tmp_path, lights, tiny_vit, flag):
    trainer = tiny_trainer(
        tmp_path, lights, tiny_vit, flag, "1", "--crop_padding", "0", "--flip", "0"
    )
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = trainer._prepare_inputs(batch)
    targets, labels = inputs["labels"], batch["labels"].float()
    assert targets.shape == labels.shape and not torch.equal(targets, labels)
    # A light that is on brightens its share of an image, so the mean colour determines the target.
    colours = inputs["pixel_values"].mean(dim=(2, 3))
    plain = trainer.preprocessing(batch["pixel_values"]).mean(dim=(2, 3))
    dark, bright = plain[labels == 0].mean(), plain[labels == 1].mean()
    assert ((colours - dark) / (bright - dark) - targets).abs().max() < 0.05


def test_gradients_are_the_same_with_and_without_accumulation(tmp_path, lights, tiny_vit):
    gradients = []
    for size, steps in (("16", "1"), ("4", "4")):
        trainer = tiny_trainer(
            tmp_path / size, lights, tiny_vit, "--per_device_train_batch_size", size,
            "--gradient_accumulation_steps", steps, "--crop_padding", "0", "--flip", "0",
            "--max_steps", "1", "--optim", "sgd", "--warmup_steps", "0", "--max_grad_norm", "0",
            "--weight_decay", "0", "--eval_strategy", "no", "--save_strategy", "no",
            "--lr_scheduler_type", "constant", "--precision", "fp32",
        )  # fmt: skip
        before = trainer.model.classifier.weight.detach().clone()
        trainer.train()
        gradients.append(before - trainer.model.classifier.weight.detach())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)


def test_the_head_is_solved_for_without_training(tmp_path, lights, tiny_vit):
    flags = ("--head_solver", "lbfgs", "--freeze", "backbone")
    result = tiny_run(tmp_path / "run", lights, tiny_vit, *flags)
    assert result.metrics["validation"]["average_precision_macro"] > 0.9


def test_metrics_of_multi_label_data_are_refused_elsewhere(tmp_path, stripes, tiny_vit, lights):
    flags = ("--metric_for_best_model", "f1_macro")
    with pytest.raises(UserError, match="f1_macro is for images with multiple labels; pass"):
        tiny_trainer(tmp_path, stripes, tiny_vit, *flags)
    flags = ("--metric_for_best_model", "balanced_accuracy")
    with pytest.raises(UserError, match="balanced_accuracy is for images with one label; pass"):
        tiny_trainer(tmp_path, lights, tiny_vit, *flags)
    flags = ("--metric_for_best_model", "f1_macro")
    assert tiny_trainer(tmp_path, lights, tiny_vit, *flags).args.metric_for_best_model == "f1_macro"


def test_with_one_label_per_image_accuracy_picks_the_best_checkpoint(tmp_path, stripes, tiny_vit):
    args = tiny_trainer(tmp_path, stripes, tiny_vit).args
    assert args.metric_for_best_model == "accuracy" and args.greater_is_better
    args = tiny_trainer(tmp_path, stripes, tiny_vit, "--class_balance", "weights").args
    assert args.metric_for_best_model == "balanced_accuracy" and args.greater_is_better
    assert TrainingConfig(output_dir="unused").metric_for_best_model is None
