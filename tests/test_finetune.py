"""hf_cifar.finetune: complete runs of a tiny model, and the files that they write."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from tiny import tiny_run
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainingArguments,
    pipeline,
)

from hf_cifar import RunConfig, UserError, evaluate_saved, finetune_classifier, load_splits
from hf_cifar.config.data import DataConfig
from hf_cifar.config.evaluation import EvaluateConfig
from hf_cifar.data.splits import DataSource
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.models.build import load_classifier
from hf_cifar.preflight import draft_card
from hf_cifar.record import known_facts
from hf_cifar.runs.folder import RunFolder


@pytest.fixture(scope="module")
def vit_run(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("runs") / "vit"
    tiny_run(
        folder,
        stripes,
        tiny_vit,
        "--num_train_epochs",
        "15",
        "--learning_rate",
        "3e-3",
        "--do_predict",
    )
    return folder


@pytest.fixture(scope="module")
def timm_run(tmp_path_factory, stripes):
    folder = tmp_path_factory.mktemp("runs") / "timm"
    tiny_run(folder, stripes, "scratch/test_efficientnet", "--image_size", "32")
    return folder


def saved_metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def stripe_images(stripes):
    return sorted((stripes / "test").rglob("*.png"))


def test_a_run_writes_all_documented_files(vit_run):
    names = {path.name for path in vit_run.iterdir() if not path.name.startswith("checkpoint")}
    assert names == {
        "config.json", "model.safetensors", "preprocessor_config.json", "config.yaml", "metrics.json",
        "predictions", "run.json", "batch.json", "README.md",
    }  # fmt: skip
    assert not list(vit_run.rglob("training_args.bin"))
    modes = {(vit_run / name).stat().st_mode for name in ("model.safetensors", "metrics.json")}
    assert len(modes) == 1  # readable by the same users
    checkpoints = list(vit_run.glob("checkpoint-*"))
    assert 1 <= len(checkpoints) <= 2


def test_metrics_follow_from_the_saved_predictions(vit_run, stripes):
    metrics = saved_metrics(vit_run)
    assert set(metrics) == {"validation", "test"}
    splits = load_splits(DataConfig(dataset_name=str(stripes)))
    for split, wanted_rows in (("validation", splits.validation.row_ids), ("test", np.arange(22))):
        table = datasets.Dataset.from_parquet(
            str(vit_run / "predictions" / f"{split}.parquet"), cache_dir=str(vit_run / "cache")
        )
        assert table["row_id"][:] == wanted_rows.tolist()
        logits = np.asarray(table["logits"][:])
        assert metrics[split]["accuracy"] == np.mean(logits.argmax(1) == table["label"][:])
        assert metrics[split]["num_images"] == len(table)
    assert metrics["validation"]["accuracy"] > 0.8


def test_the_model_is_calibrated_on_validation_and_its_labels_stay(
    vit_run, stripes, tiny_vit, tmp_path
):
    tiny_run(
        tmp_path / "plain", stripes, tiny_vit, "--num_train_epochs", "15", "--learning_rate", "3e-3",
        "--do_predict", "--calibrate", "false",
    )  # fmt: skip
    plain, calibrated = saved_metrics(tmp_path / "plain"), saved_metrics(vit_run)
    temperature = json.loads((vit_run / "run.json").read_text())["temperature"]
    assert json.loads((tmp_path / "plain" / "run.json").read_text())["temperature"] == 1
    assert "temperature" not in plain["test"] and abs(temperature - 1) > 0.01
    for split in ("validation", "test"):
        before, after = (Predictions.load(f, split) for f in (tmp_path / "plain", vit_run))
        np.testing.assert_array_equal(after.logits.argmax(axis=1), before.logits.argmax(axis=1))
        np.testing.assert_allclose(after.logits * temperature, before.logits, atol=1e-4)
        metrics = calibrated[split]
        assert metrics["temperature"] == after.temperature == temperature
        assert metrics["ece_uncalibrated"] == pytest.approx(plain[split]["ece"], abs=1e-4)
    assert calibrated["validation"]["cross_entropy"] < plain["validation"]["cross_entropy"]
    before, after = weights(tmp_path / "plain"), weights(vit_run)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_final_metrics_are_those_of_the_saved_model_in_fp32(stripes, tiny_vit, tmp_path):
    tiny_run(tmp_path, stripes, tiny_vit, "--bf16", "--do_predict")
    model = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    images = [Image.open(path).convert("RGB") for path in stripe_images(stripes)]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits.numpy()
    # In bfloat16 they would differ by about 1%.
    np.testing.assert_allclose(
        Predictions.load(tmp_path, "test").logits, logits, rtol=2e-3, atol=2e-3
    )


def test_run_json_says_what_the_source_is(vit_run, stripes):
    assert json.loads((vit_run / "run.json").read_text())["source"] == {
        "description": f"{stripes.name}: 2 classes from folders, 102 images; train/, test/ are splits",
        "num_images": {"train": 80, "test": 22},
        "left_out": {},
        "rows_left_out": {},
    }


def test_a_damaged_run_json_is_a_one_line_error(vit_run, stripes, tmp_path):
    folder = shutil.copytree(vit_run, tmp_path / "run")
    (folder / "run.json").write_text('{"temperature": ')
    config = EvaluateConfig(model_name_or_path=str(folder), use_cpu=True)
    with pytest.raises(UserError, match=r"run\.json is damaged .*; restore it"):
        evaluate_saved(config, DataConfig(dataset_name=str(stripes)))


def test_evaluate_reads_the_temperature_of_a_run(vit_run, stripes):
    config = EvaluateConfig(model_name_or_path=str(vit_run), use_cpu=True)
    again = evaluate_saved(config, DataConfig(dataset_name=str(stripes)))
    before = saved_metrics(vit_run)["validation"]
    assert again.metrics["temperature"] == before["temperature"]
    assert again.metrics["ece_uncalibrated"] == pytest.approx(before["ece_uncalibrated"], abs=1e-4)


def test_the_model_loads_as_plain_transformers(vit_run, stripes):
    model = AutoModelForImageClassification.from_pretrained(vit_run).eval()
    processor = AutoImageProcessor.from_pretrained(vit_run)
    assert model.config.id2label == {0: "across", 1: "down"}
    images = [Image.open(path).convert("RGB") for path in stripe_images(stripes)]
    with torch.no_grad():
        logits = model(**processor(images, return_tensors="pt")).logits.numpy()
    table = datasets.Dataset.from_parquet(
        str(vit_run / "predictions" / "test.parquet"), cache_dir=str(vit_run / "cache")
    )
    # Both paths, ours and the saved image processor's, see the same pixels.
    assert np.abs(logits - np.asarray(table["logits"][:])).max() < 1e-2
    classify = pipeline("image-classification", model=str(vit_run), device="cpu")
    assert classify(images[0])[0]["label"] == model.config.id2label[int(logits[0].argmax())]


def test_timm_loads_a_saved_timm_model(timm_run):
    import timm

    model = AutoModelForImageClassification.from_pretrained(timm_run).eval()
    plain = timm.create_model(f"local-dir:{timm_run}", pretrained=True).eval()
    ours, theirs = model.timm_model.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # The same weights at other addresses: the last bit of a kernel's sums may differ.
        torch.testing.assert_close(model(images).logits, plain(images))
    settings = timm.data.resolve_model_data_config(plain)
    assert (settings["input_size"], settings["crop_pct"]) == ([3, 32, 32], 1.0)
    assert AutoImageProcessor.from_pretrained(timm_run).data_config["input_size"] == (3, 32, 32)


def test_test_stays_sealed_unless_requested(timm_run):
    assert set(saved_metrics(timm_run)) == {"validation"}
    assert not (timm_run / "predictions" / "test.parquet").exists()


def test_evaluate_adds_test_to_the_same_file(timm_run, stripes):
    before = saved_metrics(timm_run)["validation"]
    config = EvaluateConfig(model_name_or_path=str(timm_run), split="test", use_cpu=True)
    evaluation = evaluate_saved(config, DataConfig(dataset_name=str(stripes)))
    metrics = saved_metrics(timm_run)
    assert metrics["test"] == json.loads(json.dumps(evaluation.metrics))
    assert metrics["validation"] == before
    again = EvaluateConfig(model_name_or_path=str(timm_run), use_cpu=True)
    repeated = evaluate_saved(again, DataConfig(dataset_name=str(stripes)))
    assert repeated.metrics["accuracy"] == before["accuracy"]
    assert repeated.metrics["cross_entropy"] == pytest.approx(before["cross_entropy"], rel=1e-5)


def test_evaluate_refuses_other_classes(timm_run):
    config = EvaluateConfig(model_name_or_path=str(timm_run), split="test", use_cpu=True)
    with pytest.raises(UserError, match=r"10 of the 10 classes.*'0'.*across.*dataset_name"):
        evaluate_saved(config, DataConfig(dataset_name="bundled/digits"))


def test_a_saved_config_repeats_the_run_bit_for_bit(tmp_path, vit_run):
    config = RunConfig.parse(
        ["--config", str(vit_run / "config.yaml"), "--output_dir", str(tmp_path / "again")]
    )
    result = finetune_classifier(config)
    first, second = weights(vit_run), weights(result.output_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (
        json.loads((vit_run / "run.json").read_text())["split_hash"]
        in (result.output_dir / "README.md").read_text()
    )


def test_the_best_checkpoint_is_kept(tmp_path, stripes, tiny_vit):
    """A growing learning rate ruins the last model; the saved one is the best."""
    result = tiny_run(
        tmp_path / "run", stripes, tiny_vit, "--num_train_epochs", "8", "--learning_rate", "1",
        "--warmup_steps", "0.99", "--lr_scheduler_type", "constant_with_warmup",
    )  # fmt: skip
    states = sorted(
        (tmp_path / "run").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])
    )
    state = json.loads((states[-1] / "trainer_state.json").read_text())
    best = max(log["eval_accuracy"] for log in state["log_history"] if "eval_accuracy" in log)
    assert result.metrics["validation"]["accuracy"] == best == state["best_metric"]


@pytest.mark.parametrize("metric", ["cross_entropy", "eval_loss"])
def test_the_best_by_a_loss_is_the_lowest(tmp_path, stripes, tiny_vit, metric):
    tiny_run(
        tmp_path / "run",
        stripes,
        tiny_vit,
        "--metric_for_best_model",
        metric,
        "--num_train_epochs",
        "3",
    )
    last = max((tmp_path / "run").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text())
    key = f"eval_{metric.removeprefix('eval_')}"
    assert state["best_metric"] == min(log[key] for log in state["log_history"] if key in log)


@pytest.mark.slow
def test_a_compiled_model_is_saved_under_its_own_names(tmp_path, stripes, tiny_vit):
    flags = ["--torch_compile", "--torch_compile_backend", "eager", "--num_train_epochs", "1"]
    flags += ["--layer_decay", "0.5"]  # which needs the names too
    result = tiny_run(tmp_path / "run", stripes, tiny_vit, *flags)
    assert not any("_orig_mod" in name for name in weights(result.output_dir))
    _, loading = AutoModelForImageClassification.from_pretrained(
        result.output_dir, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def test_a_model_of_another_library_gets_a_mean_loss_too(tmp_path, stripes, tiny_vit):
    """ViT's forward takes **kwargs; the Trainer would pass num_items_in_batch and scale twice."""
    from hf_cifar.plan import plan_run
    from hf_cifar.training.build import build_trainer

    config = RunConfig.parse(
        ["--dataset_name", str(stripes), "--use_cpu", "--output_dir", str(tmp_path / "run")]
    )
    splits = load_splits(config.data)
    model = AutoModelForImageClassification.from_pretrained(tiny_vit)
    processor = AutoImageProcessor.from_pretrained(tiny_vit)
    trainer = build_trainer(model, processor, splits, plan_run(config, model, processor, splits))
    assert trainer.model_accepts_loss_kwargs is False


def test_an_open_data_set_of_other_options_is_refused(tmp_path, stripes):
    from hf_cifar.data.splits import DataSource

    flags = ["--dataset_name", str(stripes), "--use_cpu", "--output_dir", str(tmp_path / "run")]
    config = RunConfig.parse(flags)
    source = DataSource(RunConfig.parse([*flags, "--split_seed", "7"]).data)
    with pytest.raises(UserError, match=r"the open data set is not the one in config\.data"):
        finetune_classifier(config, source)
    assert not (tmp_path / "run").exists()


def test_early_stopping(tmp_path, stripes, tiny_vit):
    tiny_run(
        tmp_path / "run", stripes, tiny_vit, "--num_train_epochs", "9", "--learning_rate", "1e-9",
        "--early_stopping_patience", "2",
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "run.json").read_text())["epochs"] == 3


@pytest.mark.parametrize("place", [".", "train", "train/down"])
def test_a_folder_of_the_data_is_no_output_folder(tmp_path, stripes, tiny_vit, place):
    data = tmp_path / "data"
    shutil.copytree(stripes, data)
    before = sorted(data.rglob("*"))
    with pytest.raises(UserError, match=r"--output_dir .* holds the data; pass a new folder"):
        tiny_run(data / place, data, tiny_vit)
    assert sorted(data.rglob("*")) == before


def test_a_folder_with_a_run_is_refused_and_unchanged(vit_run, stripes, tiny_vit):
    before = {p: p.stat().st_mtime_ns for p in vit_run.rglob("*")}
    with pytest.raises(UserError, match=r"holds another run.*--resume_from_checkpoint"):
        tiny_run(vit_run, stripes, tiny_vit)
    assert {p: p.stat().st_mtime_ns for p in vit_run.rglob("*")} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume_from_checkpoint", "nowhere/checkpoint-4"], "no checkpoint in nowhere"),
        (["--fp16"], "fp16 needs a GPU"),
        (["--image_size", "18"], "patch size 4"),
    ],
)
def test_invalid_options_leave_no_files(tmp_path, stripes, tiny_vit, flags, message):
    with pytest.raises(UserError, match=message):
        tiny_run(tmp_path / "run", stripes, tiny_vit, *flags)
    assert not (tmp_path / "run").exists()


def test_one_command_line_starts_a_run_and_resumes_it(tmp_path, stripes, tiny_vit):
    again = ["--resume_from_checkpoint", "last", "--num_train_epochs"]
    for epochs in (1, 2):
        tiny_run(tmp_path / "run", stripes, tiny_vit, *again, str(epochs))
        assert RunFolder(tmp_path / "run").facts()["epochs"] == epochs
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tmp_path / "run" / "config.json", other)
    with pytest.raises(UserError, match="has a model, but no run to resume"):
        tiny_run(other, stripes, tiny_vit, *again, "1")


def test_do_predict_needs_a_test_split(tmp_path, stripes, tiny_vit):
    with pytest.raises(UserError, match="no labelled test split"):
        tiny_run(tmp_path / "run", stripes / "train", tiny_vit, "--do_predict")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_found_before_training(tmp_path):
    from hf_cifar.preflight import require_space

    with pytest.raises(UserError, match="no space left"):
        require_space(tmp_path / "run", 10**18)


def test_images_of_mixed_sizes_train(tmp_path, stripes, tiny_vit):
    mixed = tmp_path / "mixed"
    for i, path in enumerate(sorted((stripes / "train").rglob("*.png"))[::4]):
        target = mixed / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((16 + i, 20)).save(target)
    result = tiny_run(tmp_path / "run", mixed, tiny_vit, "--dataloader_num_workers", "2")
    assert result.metrics["validation"]["num_images"] == 2


def test_resuming_a_finished_run_changes_nothing(tmp_path, stripes, tiny_vit, capsys):
    tiny_run(tmp_path / "run", stripes, tiny_vit)
    first, facts = weights(tmp_path / "run"), (tmp_path / "run" / "run.json").read_text()
    tiny_run(tmp_path / "run", stripes, tiny_vit, "--resume_from_checkpoint", "last")
    second = weights(tmp_path / "run")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "run" / "run.json").read_text() == facts
    assert "steps are done; raise --num_train_epochs" in capsys.readouterr().out


def test_results_of_the_previous_model_are_removed_when_a_run_continues(
    tmp_path, stripes, tiny_vit
):
    folder = tmp_path / "run"
    tiny_run(folder, stripes, tiny_vit, "--max_steps", "2", "--do_predict")
    (folder / "report.html").write_text("of the first model")
    tiny_run(folder, stripes, tiny_vit, "--max_steps", "4", "--resume_from_checkpoint", "last")
    assert list(json.loads((folder / "metrics.json").read_text())) == ["validation"]
    assert [path.name for path in (folder / "predictions").iterdir()] == ["validation.parquet"]
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "change", [["--freeze", "backbone"], ["--flip", "0.25"], ["--max_train_samples", "20"]]
)
def test_a_resumed_run_is_the_same_run(tmp_path, stripes, tiny_vit, change):
    tiny_run(tmp_path / "run", stripes, tiny_vit, "--max_steps", "2")
    config = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(
        UserError, match=rf"{change[0]} is {change[1]}, but the run in .* started with"
    ):
        tiny_run(
            tmp_path / "run", stripes, tiny_vit, "--max_steps", "4", *change,
            "--resume_from_checkpoint", "last",
        )  # fmt: skip
    assert (tmp_path / "run" / "config.yaml").read_text() == config


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_a_diverging_run_is_reported(tmp_path, stripes, tiny_vit, strategy):
    with pytest.raises(UserError, match=r"^training diverged: .* is (nan|inf) at step .* lower"):
        tiny_run(
            tmp_path / "run", stripes, tiny_vit, "--learning_rate", "900", "--optim", "sgd",
            "--warmup_steps", "0", "--max_grad_norm", "0", "--logging_steps", "2",
            "--eval_strategy", strategy, "--num_train_epochs", "4",
        )  # fmt: skip


STREAMED = ("--streaming", "--max_eval_samples", "8", "--label_column_name", "label")
THREE_EPOCHS = (
    "--num_train_epochs", "3", "--dataloader_num_workers", "2", "--do_predict",
    "--save_total_limit", "3", "--load_best_model_at_end", "false",
)  # fmt: skip


@pytest.fixture(scope="module")
def streamed_run(tmp_path_factory, shards, tiny_vit):
    folder = tmp_path_factory.mktemp("runs") / "streamed"
    tiny_run(folder, shards, tiny_vit, *STREAMED, *THREE_EPOCHS)
    return folder


def test_a_stream_trains_in_epochs_of_whole_batches(streamed_run):
    facts = json.loads((streamed_run / "run.json").read_text())
    assert facts["num_train"] == 72
    assert facts["steps"] == 3 * 9
    assert list(facts["label_counts"]) == ["validation"]
    assert saved_metrics(streamed_run)["test"]["num_images"] == 8
    assert "hash of their bytes" in (streamed_run / "README.md").read_text()


def test_a_stream_resumes_to_the_same_weights(tmp_path, streamed_run, shards, tiny_vit):
    """A run that stops early and resumes ends with the weights of an uninterrupted one."""
    folder = tmp_path / "again"
    shutil.copytree(streamed_run, folder)
    for path in [*folder.glob("checkpoint-27"), *folder.glob("*.safetensors")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert (folder / "checkpoint-18").is_dir()
    tiny_run(folder, shards, tiny_vit, *STREAMED, *THREE_EPOCHS, "--resume_from_checkpoint", "last")
    before, after = weights(streamed_run), weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_stream_resumes_in_mid_epoch_with_the_same_number_of_workers(
    tmp_path, shards, tiny_vit, monkeypatch
):
    flags = (*STREAMED, "--num_train_epochs", "1", "--save_strategy", "steps", "--save_steps", "4")
    flags += (
        "--eval_strategy",
        "no",
        "--load_best_model_at_end",
        "false",
        "--save_total_limit",
        "3",
    )
    monkeypatch.setattr("hf_cifar.training.build.default_num_workers", lambda resident: 2)
    tiny_run(tmp_path / "uninterrupted", shards, tiny_vit, *flags)
    shutil.copytree(tmp_path / "uninterrupted", tmp_path / "part")
    for path in [tmp_path / "part/checkpoint-8", tmp_path / "part/checkpoint-9"]:
        shutil.rmtree(path)
    (tmp_path / "part/model.safetensors").unlink()
    resumed = (*flags, "--resume_from_checkpoint", "last")
    with pytest.raises(UserError, match="--dataloader_num_workers is 0, but the run"):
        tiny_run(tmp_path / "part", shards, tiny_vit, *resumed, "--dataloader_num_workers", "0")
    monkeypatch.setattr("hf_cifar.training.build.default_num_workers", lambda resident: 1)
    tiny_run(tmp_path / "part", shards, tiny_vit, *resumed)
    before, after = weights(tmp_path / "uninterrupted"), weights(tmp_path / "part")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["auto_find_batch_size", "dataloader_persistent_workers"])
def test_options_that_a_stream_does_not_support_are_refused(tmp_path, shards, tiny_vit, name):
    with pytest.raises(UserError, match=f"--{name} cannot be combined with --streaming"):
        tiny_run(
            tmp_path / "run",
            shards,
            tiny_vit,
            *STREAMED,
            f"--{name}",
            "--dataloader_num_workers",
            "1",
        )


def test_a_stream_does_not_cache_features(tmp_path, shards, tiny_vit):
    flags = (*STREAMED, "--freeze", "backbone", "--head_solver", "lbfgs")
    with pytest.raises(UserError, match="no mixup, cutmix or --streaming"):
        tiny_run(tmp_path / "run", shards, tiny_vit, *flags)


def test_the_draft_card_equals_the_final_card_except_for_metrics(vit_run):
    folder = RunFolder(vit_run)
    config = folder.load_config()
    model = load_classifier(str(vit_run))[0]
    source = DataSource(config.data)
    draft = draft_card(config, model, known_facts(source, source.splits, None, config))
    draft = ModelCard(draft).data.to_dict()
    final = ModelCard((vit_run / "README.md").read_text()).data.to_dict()
    results = [metadata.pop("model-index")[0]["results"] for metadata in (draft, final)]
    assert draft == final
    assert [r["dataset"] for r in results[0]] == [r["dataset"] for r in results[1]]


def test_a_run_constructs_its_training_arguments_once(tmp_path, stripes, tiny_vit, monkeypatch):
    counted, original = [], TrainingArguments.__post_init__

    def count(self):
        counted.append(type(self).__name__)
        original(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", count)
    tiny_run(tmp_path / "run", stripes, tiny_vit, "--do_predict", "--adam_beta2", "0.95")
    assert counted == ["TrainingArguments"]


def test_a_resumed_run_keeps_what_its_command_line_leaves_open(tmp_path, stripes, tiny_vit):
    folder, steps = tmp_path / "run", ("--eval_strategy", "steps", "--eval_steps", "3")
    first = ("--max_steps", "3", "--max_grad_norm", "0.5", "--adam_beta1", "0.8", *steps)
    tiny_run(folder, stripes, tiny_vit, *first)
    before = RunFolder(folder).options()
    tiny_run(folder, stripes, tiny_vit, "--max_steps", "6", "--resume_from_checkpoint", "last")
    after = RunFolder(folder).options()
    assert {name for name in before if before[name] != after[name]} == {"max_steps"}
    assert before.keys() == after.keys() and after["adam_beta1"] == 0.8


def test_a_resumed_run_refuses_missing_and_changed_options(tmp_path, stripes, tiny_vit):
    folder, last = tmp_path / "run", ("--max_steps", "2", "--resume_from_checkpoint", "last")
    tiny_run(folder, stripes, tiny_vit, "--max_steps", "1", "--max_eval_samples", "4")
    with pytest.raises(
        UserError, match=r"--max_eval_samples is the default, but .* started with 4"
    ):
        tiny_run(folder, stripes, tiny_vit, *last)
    same = ("--max_eval_samples", "4", "--adam_beta1", "0.9")  # the latter is the default
    with pytest.raises(UserError, match=r"--adam_beta2 is 0\.5, but .* started with the default"):
        tiny_run(folder, stripes, tiny_vit, *last, *same, "--adam_beta2", "0.5")
    tiny_run(folder, stripes, tiny_vit, *last, *same)
    other = shutil.copytree(folder, tmp_path / "other") / "checkpoint-2"
    with pytest.raises(UserError, match="holds another run"):
        tiny_run(folder, stripes, tiny_vit, *same, "--resume_from_checkpoint", str(other))
