"""hf_cifar.evaluate: a finished model on its own data and on other data."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Value,
    concatenate_datasets,
)
from datasets import Image as ImageFeature
from PIL import Image

from hf_cifar import UserError, evaluate_saved
from hf_cifar.cli import main
from hf_cifar.config.data import DataConfig
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.runs.folder import RunFolder
from tests.tiny import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, stripes, tiny_vit):
    """A run on the stripes, with a split seed of its own and test evaluated."""
    folder = tmp_path_factory.mktemp("run")
    tiny_run(folder, stripes, tiny_vit, "--do_predict", "--split_seed", "7")
    return folder


@pytest.fixture
def measure(run, tmp_path):
    """A function (data set, split, options) -> predictions of the run's model."""

    def evaluate(data, split, **options):
        config = EvaluateConfig(
            model_name_or_path=str(run), split=split, use_cpu=True, output_dir=str(tmp_path / "out")
        )
        return evaluate_saved(config, DataConfig(dataset_name=str(data), **options))

    return evaluate


def rows_of(stripes, split, classes, names=None):
    """The stripes of some classes; names: of the ClassLabel, in its order."""
    images, labels = [], []
    for name in classes:
        for path in sorted((stripes / split / name).glob("*.png")):
            images.append({"bytes": path.read_bytes(), "path": None})
            labels.append(name)
    label = ClassLabel(names=names) if names else Value("string")
    features = Features({"image": ImageFeature(), "label": label})
    ids = [names.index(name) for name in labels] if names else labels
    return Dataset.from_dict({"image": images, "label": ids}, features=features)


@pytest.mark.parametrize("names", [["down", "across"], ["x", "down", "y", "across"], None])
def test_classes_in_another_order_are_matched_by_name(run, measure, stripes, save, names):
    original = Predictions.load(run, "test")
    rows = rows_of(stripes, "test", ["across", "down"], names)
    found = measure(save(test=rows), "test")
    assert found.id2label == original.id2label == {0: "across", 1: "down"}
    assert found.labels.tolist() == original.labels.tolist()
    np.testing.assert_allclose(found.logits, original.logits, atol=1e-4)
    assert found.metrics["accuracy"] == original.metrics["accuracy"]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_data_without_splits_are_measured_whole(measure, stripes, tmp_path, split, caplog):
    caplog.set_level("INFO")
    shutil.copytree(stripes / "test", tmp_path / "later")
    found = measure(tmp_path / "later", split)
    assert (found.split, len(found.labels)) == (split, 22)
    assert "later has no splits: all of its images are evaluated, 22" in caplog.text


def test_names_in_other_capitals_are_matched(measure, stripes, tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("Across", "DOWN"):
        shutil.copytree(stripes / "test" / name.lower(), tmp_path / "later" / name)
    assert np.bincount(measure(tmp_path / "later", "test").labels).tolist() == [11, 11]
    assert "class DOWN of train is read as down of the model" in caplog.text


def test_another_run_and_the_data_are_never_overwritten(run, stripes, tmp_path):
    shutil.copytree(stripes / "test", tmp_path / "later")
    shutil.copytree(run, tmp_path / "another")
    before = (tmp_path / "another" / "metrics.json").read_bytes()
    data = DataConfig(dataset_name=str(tmp_path / "later"))
    for folder, message in (
        ("another", r"another holds another run; pass another --output_dir"),
        ("later", r"later holds the data; pass a new folder"),
        ("later/down", r"down holds the data; pass a new folder"),
    ):
        config = EvaluateConfig(
            model_name_or_path=str(run), use_cpu=True, output_dir=str(tmp_path / folder)
        )
        with pytest.raises(UserError, match=message):
            evaluate_saved(config, data)
    assert (tmp_path / "another" / "metrics.json").read_bytes() == before
    argv = ["evaluate", "--model_name_or_path", str(run), "--output_dir", f"{run}/", "--use_cpu"]
    assert main([*argv, "--dataset_name", str(tmp_path / "later")]) == 2


def test_a_subset_of_the_classes_is_measured(measure, stripes, tmp_path, caplog):
    caplog.set_level("INFO")
    rows_of(stripes, "test", ["down"]).save_to_disk(str(tmp_path / "some"))
    found = measure(tmp_path / "some", "test")
    assert (found.labels == 1).all() and len(found.labels) == 11
    assert "1 of 2 classes have no images in train of" in caplog.text
    metrics = found.metrics
    assert metrics["per_class"]["across"]["num_images"] == 0
    assert metrics["accuracy"] == metrics["balanced_accuracy"] == metrics["recall_weighted"]
    assert metrics["intervals"]["per_class"]["across"]["recall"] is None


def test_a_folder_of_one_class_is_measured(measure, stripes, tmp_path):
    shutil.copytree(stripes / "test" / "down", tmp_path / "some" / "down")
    assert measure(tmp_path / "some", "test").labels.tolist() == [1] * 11
    shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "some")
    assert len(measure(tmp_path / "packed.zip", "test").labels) == 11
    shutil.copytree(tmp_path / "some" / "down", tmp_path / "table" / "images")
    names = sorted(path.name for path in (tmp_path / "table" / "images").iterdir())
    rows = "".join(f"{name},down\n" for name in names)
    (tmp_path / "table" / "labels.csv").write_text(f"file,label\n{rows}")
    assert len(measure(tmp_path / "table", "test").labels) == 11
    (tmp_path / "some" / "down").rename(tmp_path / "some" / "up")
    with pytest.raises(UserError, match="has one class folder, up; a classifier needs two"):
        measure(tmp_path / "some", "test")


def test_unknown_classes_are_listed(measure, stripes, save):
    rows = rows_of(stripes, "test", ["across", "down"], ["across", "down", "dots", "grid"])
    labels = rows["label"][:]
    labels[3] = labels[4] = 2
    labels[9] = 3
    rows = rows.remove_columns("label").add_column("label", labels, feature=rows.features["label"])
    with pytest.raises(
        UserError,
        match=r"does not know 2 of the 4 classes of test: 'dots' \(2 images\), 'grid' \(1 image\); it "
        "knows across, down",
    ):
        measure(save(test=rows), "test")


def test_other_data_with_splits_are_never_divided(measure, stripes, save):
    test = rows_of(stripes, "test", ["across", "down"])
    parts = {"train": test.select(range(0, 22, 2)), "test": test.select(range(1, 22, 2))}
    folder = save(**parts)
    assert len(measure(folder, "test").labels) == 11
    with pytest.raises(UserError, match=r"no validation split, only \[.*\]; pass --split test"):
        measure(folder, "validation")
    assert len(measure(save(train=parts["train"], dev=test), "validation").labels) == 22
    with pytest.raises(UserError, match=r"no test split, only \['val'\]; pass --split validation"):
        measure(save(val=test), "test")


@pytest.mark.parametrize("hidden", [-1, None])
def test_other_data_without_labels_are_refused(measure, stripes, save, hidden):
    rows = rows_of(stripes, "test", ["across", "down"], ["across", "down"])
    feature = rows.features["label"]
    rows = rows.remove_columns("label").add_column("label", [hidden] * 22, feature=feature)
    with pytest.raises(UserError, match=r"split test of .* has no labels; pass another"):
        measure(save(test=rows), "test")


def test_validation_of_the_run_is_the_one_it_did_not_train_on(run, measure, stripes):
    original = Predictions.load(run, "validation")
    again = measure(stripes, "validation", split_seed=7)
    assert again.row_ids.tolist() == original.row_ids.tolist()
    few = measure(stripes, "validation", split_seed=7, max_eval_samples=4)
    assert set(few.row_ids.tolist()) < set(original.row_ids.tolist())
    with pytest.raises(UserError, match="--split_seed 42 would put images into validation that"):
        measure(stripes, "validation")
    with pytest.raises(UserError, match=r"--train_val_split 0\.3 would put images into"):
        measure(stripes, "validation", split_seed=7, train_val_split=0.3)


def test_the_command_takes_the_options_of_the_run_for_its_data(run, stripes, tmp_path, capsys):
    argv = ["evaluate", "--model_name_or_path", str(run), "--use_cpu"]
    argv += ["--output_dir", str(tmp_path), "--dataset_name", f"{stripes}/../{stripes.name}"]
    assert main(argv) == 0
    original, again = (Predictions.load(folder, "validation") for folder in (run, tmp_path))
    assert again.row_ids.tolist() == original.row_ids.tolist()
    assert main([*argv, "--split_seed", "3"]) == 2
    assert (
        "--split_seed 3 would put images into validation that the run trained on"
        in capsys.readouterr().err
    )


def test_data_that_changed_since_the_run_are_refused(stripes, tiny_vit, tmp_path):
    data = shutil.copytree(stripes / "train", tmp_path / "data")
    tiny_run(tmp_path / "run", data, tiny_vit)
    shutil.copy(stripes / "test" / "down" / "000.png", data / "down" / "new.png")
    config = EvaluateConfig(model_name_or_path=str(tmp_path / "run"), use_cpu=True)
    with pytest.raises(
        UserError, match="data has changed since the run, so that images it trained"
    ):
        evaluate_saved(config, DataConfig(dataset_name=str(data)))


def test_a_copy_of_the_data_of_the_run_is_recognized(stripes, tiny_vit, tmp_path, caplog):
    caplog.set_level("INFO")
    data = shutil.copytree(stripes / "train", tmp_path / "data")
    tiny_run(tmp_path / "run", data, tiny_vit)
    moved = data.rename(tmp_path / "moved")
    options = {"model_name_or_path": str(tmp_path / "run"), "output_dir": str(tmp_path / "out")}
    config = EvaluateConfig(use_cpu=True, **options)
    original = Predictions.load(tmp_path / "run", "validation")
    again = evaluate_saved(config, DataConfig(dataset_name=str(moved)))
    assert again.row_ids.tolist() == original.row_ids.tolist()
    assert "moved holds the data of the run: only its validation images" in caplog.text
    on_test = dataclasses.replace(config, split="test")
    with pytest.raises(
        UserError, match="holds the images that the run was trained on, and no test"
    ):
        evaluate_saved(on_test, DataConfig(dataset_name=str(moved)))
    # As many images of each class, but other ones.
    for path in moved.rglob("*.png"):
        pixels = 255 - np.asarray(Image.open(path))
        Image.fromarray(pixels).save(path)
    assert len(evaluate_saved(config, DataConfig(dataset_name=str(moved))).labels) == 80


def test_train_of_the_run_is_named_as_such(stripes, tiny_vit, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(stripes / "train", data / "train")
    shutil.copytree(stripes / "test", data / "validation")
    tiny_run(tmp_path / "run", data, tiny_vit)
    options = {"model_name_or_path": str(tmp_path / "run"), "output_dir": str(tmp_path / "out")}
    found = evaluate_saved(
        EvaluateConfig(use_cpu=True, split="test", **options),
        DataConfig(dataset_name=str(data / "train")),
    )
    assert len(found.labels) == 80
    assert "holds the images that the run was trained on: the metrics say nothing" in caplog.text


def test_the_run_has_no_test_split(stripes, tiny_vit, tmp_path):
    data = shutil.copytree(stripes / "train", tmp_path / "data")
    tiny_run(tmp_path / "run", data, tiny_vit)
    config = EvaluateConfig(model_name_or_path=str(tmp_path / "run"), split="test", use_cpu=True)
    with pytest.raises(UserError, match="has no labelled test split"):
        evaluate_saved(config, DataConfig(dataset_name=str(data)))


def test_a_model_without_a_run_is_measured_on_all_images(run, stripes, tmp_path):
    model = shutil.copytree(run, tmp_path / "model")
    for path in (model / "config.yaml", model / "run.json"):
        path.unlink()
    options = {"model_name_or_path": str(model), "output_dir": str(tmp_path / "out")}
    config = EvaluateConfig(use_cpu=True, **options)
    data = shutil.copytree(stripes / "test", tmp_path / "data")
    assert len(evaluate_saved(config, DataConfig(dataset_name=str(data))).labels) == 22


def test_a_stream_of_other_data_is_matched_by_name(run, measure, stripes, tmp_path, datasets_cache):
    (tmp_path / "hub").mkdir()
    rows = rows_of(stripes, "test", ["across", "down"], ["down", "across"])
    rows.to_parquet(str(tmp_path / "hub" / "test.parquet"))
    found = measure(tmp_path / "hub", "test", streaming=True)
    assert found.metrics["accuracy"] == Predictions.load(run, "test").metrics["accuracy"]


def test_a_run_with_a_class_of_one_image(stripes, tiny_vit, tmp_path, capsys):
    names = ["across", "blank", "down", "never"]
    rows = rows_of(stripes, "train", ["across", "down"], names)
    blank = Dataset.from_dict(
        {"image": [Image.new("RGB", (16, 16), "white")], "label": [1]}, features=rows.features
    )
    test = rows_of(stripes, "test", ["down", "across"], ["down", "across", "blank"])
    data = DatasetDict(train=concatenate_datasets([rows, blank]), test=test)
    data.save_to_disk(str(tmp_path / "data"))
    result = tiny_run(tmp_path / "run", tmp_path / "data", tiny_vit, "--do_predict")
    facts = RunFolder(tmp_path / "run").facts()
    assert facts["label_counts"]["train"] == {"across": 36, "blank": 1, "down": 36}
    assert facts["label_counts"]["validation"]["blank"] == 0
    for split, metrics in result.metrics.items():
        assert metrics["per_class"]["blank"]["num_images"] == 0
        assert metrics["per_class"]["blank"]["average_precision"] is None
        present = [metrics["per_class"][name]["recall"] for name in ("across", "down")]
        assert metrics["balanced_accuracy"] == pytest.approx(np.mean(present))
        json.dumps(metrics, allow_nan=False)
        assert Predictions.load(tmp_path / "run", split).metrics == metrics
    assert "blank" in (tmp_path / "run" / "README.md").read_text()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "blank" in (tmp_path / "run" / "report.html").read_text()
    argv = ["evaluate", "--model_name_or_path", str(tmp_path / "run"), "--use_cpu"]
    assert main([*argv, "--split", "test"]) == 0
    assert "blank" in capsys.readouterr().out
