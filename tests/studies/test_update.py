"""hf_cifar.studies.update: a run continued with new rows and classes."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import tiny_run

from hf_cifar import UserError
from hf_cifar.cli import main
from hf_cifar.config.data import DataConfig
from hf_cifar.config.model import ModelConfig
from hf_cifar.config.studies import UpdateConfig
from hf_cifar.config.training import TrainingConfig
from hf_cifar.data.sources import load_source
from hf_cifar.data.splits import DataSource
from hf_cifar.data.stored import StoredRows, write_stored
from hf_cifar.data.stratify import equal_rows
from hf_cifar.evaluate import adjust_classifier
from hf_cifar.evaluation.comparison import compare_predictions
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.build import build_model, load_classifier
from hf_cifar.models.heads import linear_head
from hf_cifar.preflight import check_device
from hf_cifar.report.update import verdict
from hf_cifar.run_data import open_data
from hf_cifar.runs.folder import RunFolder
from hf_cifar.runs.lock import claimed_run
from hf_cifar.studies.replay import EarlierRows, store_rows
from hf_cifar.studies.update_options import config_anew, config_of_update


def paint(folder, name, count, seed):
    """Save images of one class: stripes across or down, or checks."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        lines = (np.arange(16) + generator.integers(0, 4)) // 2 % 2 == 0
        mask = {
            "across": np.repeat(lines[:, None], 16, 1),
            "down": np.repeat(lines[None], 16, 0),
            "checks": lines[:, None] ^ lines[None],
        }[name]
        pixels = generator.integers(0, 60, (16, 16, 3)) + 180 * mask[..., None]
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """New data: a new class, and more images of a known one."""
    root = tmp_path_factory.mktemp("checks")
    for split, count in (("train", 30), ("test", 11)):
        for number, name in enumerate(("checks", "down")):
            paint(root / split / name, name, count, number)
    return root


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """More images of known classes."""
    root = tmp_path_factory.mktemp("more")
    for split, count in (("train", 40), ("test", 11)):
        for number, name in enumerate(("across", "down")):
            paint(root / split / name, name, count, 7 + number + count)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory, stripes):
    """A finished run of a small CNN on the stripes."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    tiny_run(folder, stripes, "scratch/article_cnn", "--num_train_epochs", "3", "--do_predict")
    return folder


def update(run, data, folder, *flags):
    command = ["update", str(run), "--dataset_name", str(data), "--output_dir", str(folder)]
    return main([*command, "--use_cpu", "--precision", "fp32", *flags])


def facts_of(folder):
    """The content of update.json."""
    return json.loads(RunFolder(folder).update_path.read_text())


@pytest.fixture(scope="module")
def updated(run, checks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("updated") / "run"
    flags = ("--replay", "20", "--do_predict", "--learning_rate", "1e-3")
    assert update(run, checks, folder, *flags) == 0
    return folder


def test_replayed_rows_are_as_equally_divided_as_possible():
    labels = np.array([0] * 5 + [1] * 2 + [2] * 9)
    order = np.random.default_rng(7).permutation(16)
    expected = []
    for label, count in ((0, 3), (1, 2), (2, 3)):
        expected += [row for row in order.tolist() if labels[row] == label][:count]
    assert equal_rows(labels, 8, seed=7).tolist() == sorted(expected)
    assert set(equal_rows(labels, 8, 7)) < set(equal_rows(labels, 11, 7))
    assert equal_rows(labels, 99, 7).tolist() == list(range(16))


def test_replayed_rows_of_several_labels_have_the_rare_ones():
    labels = np.zeros((40, 3), np.uint8)
    labels[:36, 0] = 1
    labels[[3, 39], 1] = 1
    labels[[38], 2] = 1
    chosen = equal_rows(labels, 6, seed=0)
    assert {3, 38, 39} <= set(chosen.tolist())
    assert 37 not in chosen and 36 not in chosen


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_a_grown_head_keeps_the_logits_of_known_classes(name, stripes, tiny_vit, tmp_path):
    model = str(tiny_vit) if name == "vit" else "scratch/test_resnet"
    flags = [] if name == "vit" else ["--image_size", "32"]
    tiny_run(tmp_path / "run", stripes, model, "--num_train_epochs", "1", *flags)
    before = load_classifier(str(tmp_path / "run")).model.eval()
    config = ModelConfig(model_name_or_path=str(tmp_path / "run"), grow_head=True)
    after = build_model(config, {0: "new", 1: "down", 2: "across", 3: "newer"}).model.eval()
    images = torch.randn(5, 3, *((16, 16) if name == "vit" else (32, 32)))
    assert before.config.id2label == {0: "across", 1: "down"}
    head, grown_head = linear_head(before), linear_head(after)
    assert torch.equal(grown_head.weight[[2, 1]], head.weight)
    assert torch.equal(grown_head.bias[[2, 1]], head.bias)
    with torch.inference_mode():
        old, grown = before(pixel_values=images).logits, after(pixel_values=images).logits
        # A product with more columns may round differently.
        torch.testing.assert_close(grown[:, [2, 1]], old, atol=1e-6, rtol=0)
        grown_head.weight, grown_head.bias = (
            torch.nn.Parameter(each[[2, 1]]) for each in (grown_head.weight, grown_head.bias)
        )
        assert torch.equal(after(pixel_values=images).logits, old)
    mean = head.bias.mean().expand(5)
    assert torch.equal(grown[:, 0], mean) and torch.equal(grown[:, 3], mean)


def test_two_updates_of_a_timm_model(stripes, checks, more, tmp_path):
    tiny_run(tmp_path / "run", stripes, "scratch/test_resnet", "--image_size", "32")
    assert update(tmp_path / "run", checks, tmp_path / "first", "--replay", "20") == 0
    assert update(tmp_path / "first", more, tmp_path / "second", "--replay", "20") == 0
    for name in ("first", "second"):
        model = load_classifier(str(tmp_path / name)).model
        assert model.config.id2label == {0: "across", 1: "down", 2: "checks"}


def test_an_update_keeps_old_class_ids_and_appends_new_ones(updated, run):
    config = RunFolder(updated).model_config()
    assert config["id2label"] == {"0": "across", "1": "down", "2": "checks"}
    facts = facts_of(updated)
    assert [each["name"] for each in facts["classes"] if each["is_new"]] == ["checks"]
    assert [each["num_stored"] for each in facts["classes"]] == [10, 10, 0]
    assert [each["num_new"] for each in facts["classes"]] == [0, 27, 27]
    counts = RunFolder(updated).facts()["label_counts"]["train"]
    assert counts == {"across": 10, "down": 37, "checks": 27}
    assert Predictions.load(updated, "test").correct.mean() > 0.9


def test_stored_rows_are_those_of_the_draw_with_their_pixels(updated, run, stripes):
    stored = StoredRows.load(updated / "stored.parquet")
    train = open_data(RunFolder(run)).splits.train
    kept = equal_rows(train.labels, 20, seed=42)
    assert stored.row_ids("train").tolist() == train.row_ids[kept].tolist()
    cell = stored.of("train").with_format(None)[3]["image"]
    assert cell["bytes"] == Path(train.rows[int(kept[3])]["image"]["path"]).read_bytes()
    assert cell["path"] == "/".join(Path(train.rows[int(kept[3])]["image"]["path"]).parts[-2:])
    assert len(stored.row_ids("validation")) == len(Predictions.load(run, "validation").row_ids)
    assert len(stored.row_ids("test")) == 22


@pytest.mark.parametrize("split", ["validation", "test"])
def test_forgetting_is_the_paired_difference_on_the_old_rows(updated, run, split):
    before, after = (Predictions.load(folder, split) for folder in (run, updated))
    old = slice(-len(before.row_ids), None)
    assert after.labels[old].tolist() == before.labels.tolist()
    only_before = (before.correct & ~after.correct[old]).sum()
    only_after = (~before.correct & after.correct[old]).sum()
    found = facts_of(updated)["splits"][split]["parts"]
    assert found["old"]["forgetting"]["value"] == (only_before - only_after) / len(before.labels)
    assert found["old"]["before"]["value"] == before.correct.mean()
    assert found["old"]["after"]["value"] == pytest.approx(after.correct[old].mean())
    new = after.correct[: -len(before.row_ids)]
    assert found["new"]["after"]["value"] == pytest.approx(new.mean())
    assert found["all"]["after"]["value"] == pytest.approx(after.correct.mean())
    low, high = found["old"]["forgetting"]["interval"]
    assert low <= found["old"]["forgetting"]["value"] <= high


def test_an_update_is_a_run_folder(updated, tmp_path, capsys, checks):
    folder = tmp_path / "moved"
    shutil.copytree(updated, folder)  # with its stored rows
    image = next((checks / "test" / "checks").glob("*.png"))
    name = str(folder)
    assert main(["evaluate", "--model_name_or_path", name, "--use_cpu"]) == 0
    assert main(["report", name]) == 0
    capsys.readouterr()
    assert main(["predict", "--model_name_or_path", name, "--use_cpu", str(image)]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == "checks"
    card = (folder / "README.md").read_text()
    assert "Continues the run run; 20 of its training images were stored" in card
    assert "74 training images (20 of them from the run run, whose validation images are" in card


def test_a_second_update_replays_the_stored_rows_of_the_first(updated, more, tmp_path, caplog):
    folder = tmp_path / "second"
    assert update(updated, more, folder, "--replay", "30") == 0
    facts = facts_of(folder)
    assert [each["num_stored"] for each in facts["classes"]] == [10, 10, 10]
    assert [each["num_new"] for each in facts["classes"]] == [36, 36, 0]
    assert not any(each["is_new"] for each in facts["classes"])
    old = facts["splits"]["validation"]["parts"]["old"]
    assert old["num_images"] == len(Predictions.load(updated, "validation").row_ids)


def test_data_that_are_gone(run, updated, checks, tmp_path, caplog, capsys):
    for name, source in (("lost", run), ("lost-update", updated)):
        shutil.copytree(source, tmp_path / name)
        config = tmp_path / name / "config.yaml"
        text = config.read_text().splitlines()
        text[0] = "dataset_name: ./nowhere"
        config.write_text("\n".join(text))
    assert update(tmp_path / "lost", checks, tmp_path / "no") == 2
    assert "--old_data" in capsys.readouterr().err
    assert not (tmp_path / "no" / "stored.parquet").exists()
    assert update(tmp_path / "lost-update", checks, tmp_path / "yes", "--replay", "12") == 0
    assert "has stored no rows of checks" in caplog.text
    facts = facts_of(tmp_path / "yes")
    assert [each["num_stored"] for each in facts["classes"]] == [6, 6, 0]
    assert facts["splits"]["validation"]["parts"]["old"]["before"] is not None


def test_training_anew_has_all_old_and_new_rows(run, checks, tmp_path, capsys):
    folder = tmp_path / "run"
    assert update(run, checks, folder, "--replay", "8", "--compare_anew") == 0
    out = capsys.readouterr().out
    out = out[out.index("accuracy on") :]
    assert "trained anew" in out and "anew - updated" in out
    anew = RunFolder(folder / "anew")
    assert anew.options()["model_name_or_path"] == "scratch/article_cnn"
    assert anew.facts()["num_train"] == RunFolder(run).facts()["num_train"] + 54
    pair = [Predictions.load(each, "validation") for each in (folder, anew.path)]
    found = facts_of(folder)["splits"]["validation"]["parts"]["new"]
    assert found["num_images"] == 6
    accuracy = [each.correct[:6].mean() for each in pair]
    assert found["gain_anew"]["value"] == pytest.approx(accuracy[1] - accuracy[0])
    assert "trained anew" in (folder / "update.html").read_text()
    # Once it is there, the comparison stays.
    assert update(run, checks, folder, "--replay", "8") == 0
    assert capsys.readouterr().out == out


def test_a_new_label_of_multi_label_data(lights, tmp_path):
    tiny_run(tmp_path / "run", lights, "scratch/article_cnn")
    generator = np.random.default_rng(1)
    on = generator.random((40, 2)) < 0.5
    pixels = generator.integers(0, 60, (40, 16, 16, 3))
    pixels[..., 0] += 180 * on[:, :1, None]
    pixels[:, :8] += 60 * on[:, 1:, None, None]
    features = Features({"photo": ImageFeature(), "lights": List(ClassLabel(names=["top", "r"]))})
    rows = {
        "photo": [Image.fromarray(image.clip(0, 255).astype(np.uint8)) for image in pixels],
        "lights": [[k for k, name in ((1, 0), (0, 1)) if row[name]] for row in on],
    }
    DatasetDict(train=Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "new")
    assert update(tmp_path / "run", tmp_path / "new", tmp_path / "up", "--replay", "24") == 0
    config = RunFolder(tmp_path / "up").model_config()
    assert list(config["id2label"].values()) == ["r", "g", "b", "top"]
    old = facts_of(tmp_path / "up")["splits"]["validation"]["parts"]["old"]
    before = Predictions.load(tmp_path / "run", "validation")
    assert old["before"]["value"] == pytest.approx(before.correct.mean())


def test_no_replay_is_warned_about(run, checks, tmp_path, caplog):
    assert update(run, checks, tmp_path / "run", "--replay", "0") == 0
    assert "--replay 0: no old row" in caplog.text
    assert RunFolder(tmp_path / "run").facts()["label_counts"]["train"]["across"] == 0


def test_one_new_class_in_a_folder(run, tmp_path, capsys):
    paint(tmp_path / "new" / "checks", "checks", 20, 0)
    assert update(run, tmp_path / "new", tmp_path / "run") == 2
    assert "--folders classes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert update(run, tmp_path / "new", tmp_path / "run", "--folders", "classes") == 0
    assert len(RunFolder(tmp_path / "run").model_config()["id2label"]) == 3


def test_a_class_without_test_images_is_named_and_has_no_metrics(run, tmp_path, caplog, capsys):
    caplog.set_level("INFO", "hf_cifar")
    paint(tmp_path / "new" / "checks", "checks", 20, 0)
    flags = ("--folders", "classes", "--do_predict")
    assert update(run, tmp_path / "new", tmp_path / "run", *flags) == 0
    assert "1 of 3 classes have no images in test: checks" in caplog.text
    assert "| checks | 0 | - | - | - |" in (tmp_path / "run" / "README.md").read_text()
    assert main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "new"], "--output_dir is missing"),
        (["--output_dir", "up"], "--dataset_name is missing"),
        (["--dataset_name", "new", "--output_dir", "up", "--seeds", "2"], "--seeds does not work"),
        (["--dataset_name", "a", "--output_dir", "b", "--grow_head", "false"], "--grow_head does not"),
    ],
)  # fmt: skip
def test_options_that_an_update_needs_or_sets(run, flags, message):
    with pytest.raises(UserError, match=message):
        config_of_update(RunFolder(run), flags)


def test_another_update_in_the_same_folder_is_refused(updated, run, checks, capsys):
    flags = ("--replay", "30", "--do_predict", "--learning_rate", "1e-3")
    assert update(run, checks, updated, *flags) == 2
    assert (
        "holds another update (different replay); pass another --output_dir"
        in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="is the run itself"):
        config_of_update(RunFolder(run), ["--dataset_name", "new", "--output_dir", str(run)])


def test_options_of_the_run_are_the_defaults(run):
    given = ["--dataset_name", "new", "--output_dir", "up", "--weight_decay", "0.3"]
    config = config_of_update(RunFolder(run), given)
    assert config.train.learning_rate == 5e-3 and config.train.num_train_epochs == 3
    assert config.train.weight_decay == 0.3 and not config.train.do_predict
    assert config.model.grow_head and config.model.model_name_or_path == str(run)
    assert config.data.dataset_name == "new"


def test_repository_and_teacher_of_the_run_are_left_behind(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    own = {
        "teacher": "t",
        "distillation_weight": 0.5,
        "feature_hint": 0.5,
        "hub_model_id": "me/old",
        "hub_revision": "v1",
    }
    assert "distillation" not in RunFolder(copy).config_path.read_text()  # it has no teacher
    config = RunFolder(copy).load_config().with_training(**own)
    RunFolder(copy).save_config(config)
    assert "distillation_weight: 0.5" in RunFolder(copy).config_path.read_text()
    given = ["--dataset_name", "new", "--output_dir", str(tmp_path / "up")]
    updated = config_of_update(RunFolder(copy), given)
    default = TrainingConfig()
    assert all(getattr(updated.train, name) == getattr(default, name) for name in own)
    assert config_anew(RunFolder(copy), updated).train.teacher == "t"


def test_comparison_needs_the_same_rows(updated, run):
    with pytest.raises(UserError):
        compare_predictions(
            Predictions.load(run, "validation"), Predictions.load(updated, "validation")
        )


def test_post_hoc_adjustment_is_that_of_the_shares_of_the_training_rows(stripes, tmp_path, caplog):
    caplog.set_level("INFO", "hf_cifar")
    tiny_run(tmp_path / "run", stripes, "scratch/article_cnn", "--calibrate", "false")
    model = load_classifier(str(tmp_path / "run")).model
    weight, bias = (each.detach().clone() for each in linear_head(model).parameters())
    validation = Predictions.load(tmp_path / "run", "validation")
    logits = np.array([[1.0, 0.5], [0.2, 0.0], [0.0, 2.0], [3.0, 0.0]], np.float32)
    labels = np.array([1, 1, 1, 0])
    given = dataclasses.replace(
        validation, row_ids=np.arange(4), labels=labels, logits=logits, saved_metrics={}
    )
    adjusted = adjust_classifier(model, given, torch.tensor([30.0, 10.0]))
    shift = np.log([1.5, 0.5])  # of the shares 3/4 and 1/4, times two classes
    np.testing.assert_allclose(adjusted.logits, logits - shift, atol=1e-6)
    expected = bias - torch.tensor(shift, dtype=torch.float32)
    torch.testing.assert_close(linear_head(model).bias, expected)
    assert torch.equal(linear_head(model).weight, weight)
    assert "balanced accuracy on validation 1.0000, before 0.6667" in caplog.text

    worse = adjust_classifier(model, given, torch.tensor([10.0, 3000.0]))
    assert adjusted.post_hoc and not worse.post_hoc
    assert worse is given and "the biases are not changed" in caplog.text
    torch.testing.assert_close(linear_head(model).bias, expected)


def test_a_head_that_is_solved_for_can_be_updated(stripes, checks, tiny_vit, tmp_path):
    solver = ("--freeze", "backbone", "--head_solver", "lbfgs")
    tiny_run(tmp_path / "run", stripes, tiny_vit, *solver)
    assert update(tmp_path / "run", checks, tmp_path / "up", "--replay", "20") == 0
    assert RunFolder(tmp_path / "up").options()["class_balance"] == "post_hoc"
    assert RunFolder(tmp_path / "up").facts()["post_hoc"] in (True, False)


def test_the_biases_are_corrected_only_where_that_works(run, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "hf_cifar")
    given = ["--dataset_name", "new", "--output_dir", "up"]
    assert config_of_update(RunFolder(run), given).train.class_balance == "post_hoc"
    shutil.copytree(run, tmp_path / "biasless")
    weights = load_file(run / "model.safetensors")
    (bias,) = (
        name for name, each in weights.items() if name.endswith("bias") and each.shape == (2,)
    )
    del weights[bias]
    save_file(weights, tmp_path / "biasless" / "model.safetensors")
    assert config_of_update(RunFolder(tmp_path / "biasless"), given).train.class_balance == "none"
    assert "post_hoc, the default of an update: the head has no biases" in caplog.text
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert config_of_update(RunFolder(run), given).train.class_balance == "none"
    config = config_of_update(RunFolder(run), [*given, "--class_balance", "post_hoc"])
    with pytest.raises(UserError, match="--class_balance post_hoc cannot be combined with FSDP"):
        check_device(config)


def files_below(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_a_folder_that_holds_other_things_stays_as_it_is(run, checks, stripes, tmp_path, capsys):
    data = shutil.copytree(checks, tmp_path / "data")
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "study.json").write_text("{}")
    for folder, message in (
        (data, "holds the data"),
        (tmp_path / "search", "holds runs of hf-cifar search"),
        (stripes, "holds the data"),
    ):
        before = files_below(folder)
        assert update(run, data, folder) == 2
        assert message in capsys.readouterr().err
        assert files_below(folder) == before


def test_a_mistake_leaves_nothing_and_another_try_may_have_other_rows(
    run, checks, tmp_path, capsys
):
    flags = ("--teacher", str(tmp_path / "nowhere"))
    assert update(run, checks, tmp_path / "up", *flags) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "up").exists()
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "stored.parquet").write_bytes(b"damaged")
    assert update(run, checks, tmp_path / "up", "--replay", "8", *flags) == 2
    assert "nowhere" in capsys.readouterr().err
    given = ["--dataset_name", str(checks), "--output_dir", str(tmp_path / "up")]
    config = config_of_update(RunFolder(run), given)
    splits = EarlierRows(RunFolder(run), config, UpdateConfig()).splits
    path, none = tmp_path / "up" / "stored.parquet", np.zeros(0)
    write_stored(path, splits, ["across", "down"], {"replay": 3}, none)
    assert update(run, checks, tmp_path / "up", "--replay", "8") == 0
    assert sum(each["num_stored"] for each in facts_of(tmp_path / "up")["classes"]) == 8
    (tmp_path / "up" / "stored.parquet").write_bytes(b"damaged")
    capsys.readouterr()
    assert update(run, checks, tmp_path / "up", "--replay", "8") == 2
    assert "remove it, and start hf-cifar update again" in capsys.readouterr().err


def test_empty_cells_are_left_to_the_run(tmp_path, stripes, more):
    """Both of the old and the new data, also of a test split."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["across", "down"])})

    def rows(folder):
        files = sorted(folder.rglob("*.png"))
        images = [None, *map(str, files), None]
        labels = ["across", *(file.parent.name for file in files), "down"]
        return Dataset.from_dict({"image": images, "label": labels}, features=features)

    for name, folder in (("data", stripes), ("new", more)):
        data = DatasetDict(train=rows(folder / "train"), test=rows(folder / "test"))
        data.save_to_disk(tmp_path / name)
    skip = ("--on_bad_image", "skip", "--do_predict")
    tiny_run(tmp_path / "run", tmp_path / "data", "scratch/article_cnn", *skip)
    flags = ("--replay", "20", "--do_predict", "--compare_anew")
    assert update(tmp_path / "run", tmp_path / "new", tmp_path / "up", *flags) == 0
    config = RunFolder(tmp_path / "up").load_config()
    splits = EarlierRows(RunFolder(tmp_path / "run"), config, UpdateConfig()).splits
    assert [len(each) % 2 for each in splits] and len(splits[2]) == 22
    whole = replace_positions(splits[2])
    for embeds in (True, False):
        path, known = tmp_path / "rows.parquet", np.zeros(0)
        write_stored(path, [whole], ["across", "down"], {}, known, embeds=embeds)
        cells = StoredRows.load(tmp_path / "rows.parquet").of("test").with_format(None)["image"][:]
        assert cells[0] == cells[-1] == {"bytes": None, "path": None}
        assert bool(cells[1]["bytes"]) and len(cells) == 24


def replace_positions(split):
    """The split with all rows of its source."""
    return dataclasses.replace(split, positions=np.arange(len(split.pixels)))


def test_images_that_the_run_has_are_left_out_of_the_new_data(run, stripes, tmp_path, caplog):
    """NEW is a copy of the old folder with more images, and divided anew; then with still more."""
    grown = shutil.copytree(stripes, tmp_path / "grown")
    paint(grown / "train" / "checks", "checks", 20, 0)
    flags = ("--split_seed", "7", "--do_predict", "--replay", "8")
    assert update(run, grown, tmp_path / "up", *flags) == 0
    counts = {split: len(list((stripes / split).rglob("*.png"))) for split in ("train", "test")}
    assert f"(train {counts['train']}, test {counts['test']})" in caplog.text
    source = DataSource(RunFolder(tmp_path / "up").data())
    train = source.splits.train
    assert np.bincount(train.labels).tolist() == [4, 4, 18]
    assert source.test_split.labels.tolist() == open_data(RunFolder(run)).test_split.labels.tolist()
    assert RunFolder(tmp_path / "up").facts()["source"]["stored"]["copies"] == counts
    assert "already has" in (tmp_path / "up" / "README.md").read_text()
    # It also knows the images that it has not stored.
    paint(tmp_path / "down", "down", 10, 5)
    for file in (tmp_path / "down").iterdir():
        shutil.copy(file, grown / "train" / "down" / f"new-{file.name}")
    shutil.move(grown, tmp_path / "again")
    shutil.copytree(stripes, grown)
    paint(grown / "train" / "checks", "checks", 20, 0)
    caplog.clear()
    assert update(tmp_path / "up", tmp_path / "again", tmp_path / "third", "--replay", "8") == 0
    assert f"(train {counts['train'] + 20}, test {counts['test']})" in caplog.text
    assert sum(each["num_new"] for each in facts_of(tmp_path / "third")["classes"]) == 9


def test_splits_of_known_images_and_other_labels_for_them(
    run, stripes, checks, tmp_path, caplog, capsys
):
    """Validation and test of NEW are the run's, and some training images have another label."""
    new = tmp_path / "new"
    shutil.copytree(checks / "train", new / "train")
    shutil.copytree(stripes / "test", new / "validation")
    shutil.copytree(stripes / "test", new / "test")
    shutil.copy(
        next((stripes / "train" / "across").glob("*.png")), new / "train" / "down" / "0.png"
    )
    assert update(run, new, tmp_path / "up", "--replay", "8") == 0
    assert "1 images of" in caplog.text and "have another label than in" in caplog.text
    own = DataSource(RunFolder(tmp_path / "up").data())
    assert "test" not in own.rows
    validation = own.splits.validation
    assert validation.source_split == "train" and (validation.labels == 2).sum() == 3
    # The ids are those of NEW itself, with the image that is left out.
    assert len(own.splits.train.row_ids) == 54 + 8 and own.splits.train.row_ids[53] > 53
    shutil.rmtree(new / "train" / "checks")
    shutil.copytree(stripes / "train" / "down", new / "train" / "poodle")
    assert update(run, new, tmp_path / "other") == 2
    assert "already has all training images of the new class poodle" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_another_start_does_not_remove_the_rows_of_one_that_has_begun(
    run, checks, tmp_path, capsys
):
    folder = tmp_path / "up"
    with claimed_run(folder) as is_free:
        assert is_free
        given = ["--dataset_name", str(checks), "--output_dir", str(folder)]
        config = config_of_update(RunFolder(run), given)
        store_rows(EarlierRows(RunFolder(run), config, UpdateConfig()), config)
        argv = ["update", str(run), *given, "--use_cpu"]
        done = subprocess.run(
            [sys.executable, "-m", "hf_cifar", *argv], capture_output=True, text=True
        )
        assert done.returncode == 2 and "in use" in done.stderr
        assert (folder / "stored.parquet").is_file()


def test_a_run_of_a_stream_can_be_updated_without_its_rows(stripes, checks, tmp_path):
    data = tmp_path / "rows"
    data.mkdir()
    rows = load_source(DataConfig(dataset_name=str(stripes)))["train"]
    rows.shuffle(seed=0).to_parquet(str(data / "train.parquet"))
    sizes = ("--max_train_samples", "60", "--max_eval_samples", "20")
    flags = ("--streaming", "--max_steps", "3", *sizes)
    tiny_run(tmp_path / "run", data, "scratch/article_cnn", *flags)
    assert update(tmp_path / "run", checks, tmp_path / "up", "--replay", "0") == 0
    assert [each["num_new"] for each in facts_of(tmp_path / "up")["classes"]] == [0, 27, 27]


def test_data_without_new_images_are_refused(run, stripes, tmp_path, capsys):
    shutil.copytree(stripes / "train", tmp_path / "new")
    assert update(run, tmp_path / "new", tmp_path / "up") == 2
    assert "so there is nothing to add" in capsys.readouterr().err
    assert not (tmp_path / "up").exists()


def test_a_folder_that_has_grown_in_its_place_is_explained(stripes, tmp_path, capsys):
    data = shutil.copytree(stripes, tmp_path / "data")
    tiny_run(tmp_path / "run", data, "scratch/article_cnn")
    paint(data / "train" / "checks", "checks", 20, 0)
    assert update(tmp_path / "run", data, tmp_path / "up") == 2
    assert "put new images in a folder of their own" in capsys.readouterr().err


def test_new_classes_that_are_named_like_known_ones_are_warned_about(run, tmp_path, caplog):
    paint(tmp_path / "new" / "Downs", "down", 12, 3)
    paint(tmp_path / "new" / "acros", "across", 6, 4)
    assert update(run, tmp_path / "new", tmp_path / "up") == 0
    assert "down and Downs may be one class" in caplog.text
    assert "across and acros may be one class" in caplog.text


def test_mistakes_are_found_without_torch(run, checks, tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "study.json").write_text("{}")
    new, up = str(checks), str(tmp_path / "up")
    code = f"""
import sys
from hf_cifar.cli import main
for flags in (
    ["--dataset_name", {new!r}],
    ["--dataset_name", {new!r}, "--output_dir", {str(run)!r}],
    ["--dataset_name", {new!r}, "--output_dir", "search"],
    ["--dataset_name", "./nowhere", "--output_dir", {up!r}],
    ["--dataset_name", {new!r}, "--output_dir", {up!r}, "--old_data", {new!r}],
):
    assert main(["update", {str(run)!r}, *flags]) == 2
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr
    assert not Path(up).exists()


def test_rows_that_clean_labels_leaves_out_are_not_counted(stripes, checks, tmp_path):
    """Neither as new nor as stored ones."""
    data = shutil.copytree(stripes, tmp_path / "data")
    for number in range(6):
        across, down = (data / "train" / name / f"{number:03}.png" for name in ("across", "down"))
        swapped = across.read_bytes(), down.read_bytes()
        down.write_bytes(swapped[0])
        across.write_bytes(swapped[1])
    flags = ("--num_train_epochs", "3", "--learning_rate", "1e-3")
    tiny_run(tmp_path / "run", data, "scratch/article_cnn", *flags)
    flags = ("--replay", "72", "--clean_labels", "drop")
    assert update(tmp_path / "run", checks, tmp_path / "up", *flags) == 0
    facts = RunFolder(tmp_path / "up").facts()
    assert any(row >= 60 for row in facts["doubted_rows"]["row_ids"])  # stored ones
    classes = {each["name"]: each for each in facts_of(tmp_path / "up")["classes"]}
    assert classes["across"]["num_new"] == 0
    for name, count in facts["label_counts"]["train"].items():
        assert classes[name]["num_stored"] + classes[name]["num_new"] == count


@pytest.mark.parametrize("kind", ["folders", "table", "columns"])
def test_old_classes_that_only_the_new_test_images_have(kind, run, checks, more, tmp_path):
    data = shutil.copytree(checks, tmp_path / "new")
    name = "across" if kind == "table" else "Across"
    shutil.copytree(more / "test" / "across", data / "test" / name)
    files = sorted(data.rglob("*.png"))
    rows = [(file.parent.parent.name, str(file), file.parent.name) for file in files]
    if kind == "table":
        lines = [f"{Path(path).relative_to(data)},{split},{label}" for split, path, label in rows]
        (data / "labels.csv").write_text("\n".join(["file_name,split,label", *lines]))
    if kind == "columns":
        data = tmp_path / "saved"
        splits = {
            split: Dataset.from_dict(
                {
                    "image": [path for own, path, _ in rows if own == split],
                    "label": [label for own, _, label in rows if own == split],
                }
            ).cast_column("image", ImageFeature())
            for split in ("train", "test")
        }
        DatasetDict(splits).save_to_disk(data)
    assert update(run, data, tmp_path / "up", "--do_predict", "--replay", "20") == 0
    found = facts_of(tmp_path / "up")["splits"]["test"]["parts"]
    assert found["new"]["num_images"] == 33
    labels = Predictions.load(tmp_path / "up", "test").labels
    assert np.bincount(labels).tolist() == [22, 22, 11]


def difference_of(value, low, high):
    return {"value": value, "interval": [low, high]}


def test_the_verdict_of_a_gain_has_its_interval():
    def text(*found):
        parts = {"old": {"forgetting": difference_of(*found)}}
        return verdict({"splits": {"test": {"parts": parts}}})

    assert text(-0.03, -0.04, -0.02) == (
        "The update gains 3.0 points of accuracy (95% interval +2.0 to +4.0) on the old test rows."
    )
    assert "forgets 3.0 points of accuracy (95% interval +2.0 to +4.0)" in text(0.03, 0.02, 0.04)
    assert (
        "No clear loss or gain on the old test rows: forgetting is +1.0 points of accuracy (95% interval "
        "-1.0 to +3.0)." in text(0.01, -0.01, 0.03)
    )


def test_the_verdict_falls_back_to_validation_and_compares_with_training_anew():
    def text(*gain):
        old = {"old": {"forgetting": difference_of(0.03, 0.02, 0.04)}}
        new = {"old": {}, "all": {"gain_anew": difference_of(*gain)}}
        return verdict({"splits": {"validation": {"parts": old}, "test": {"parts": new}}})

    assert "forgets 3.0 points" in text(0, 0, 0) and "old validation rows" in text(0, 0, 0)
    assert "Training anew is better by 2.0 points" in text(0.02, 0.01, 0.03)
    assert "Training anew is worse by 2.0 points" in text(-0.02, -0.03, -0.01)
    assert "neither clearly better nor worse on all test rows: +1.0" in text(0.01, -0.01, 0.03)
