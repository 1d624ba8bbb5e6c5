"""hf_cifar.studies.seeds: multiple runs of a recipe, their mean and spread."""

import json
import shutil

import numpy as np
import pytest
from tiny import tiny_options

from hf_cifar import RunConfig, UserError, finetune_classifier
from hf_cifar.cli import main
from hf_cifar.data.pixel_file import PixelFile
from hf_cifar.studies.seeds import finetune_seeds, render_seeds


def arguments(folder, data, model, *flags):
    return tiny_options(folder, data, model, "--seed", "7", *flags)


def config(*args):
    return RunConfig.parse(arguments(*args))


@pytest.fixture(scope="module")
def single(tmp_path_factory, stripes, tiny_vit):
    """A single run with the second seed of the series."""
    folder = tmp_path_factory.mktemp("single") / "run"
    finetune_classifier(config(folder, stripes, tiny_vit, "--seed", "8", "--do_predict"))
    return folder


@pytest.fixture(scope="module")
def series(tmp_path_factory, single, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("series") / "runs"
    finetune_seeds(config(folder, stripes, tiny_vit, "--seeds", "2", "--do_predict"))
    return folder


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_of_a_series_is_the_single_run_with_its_seed(series, single):
    assert weights(series / "seed-8") == weights(single)
    assert weights(series / "seed-7") != weights(single)
    assert metrics(series / "seed-8") == metrics(single)
    assert {path.name for path in (series / "seed-8").iterdir()} == {
        path.name for path in single.iterdir()
    }
    first, second = ((f / "config.yaml").read_text() for f in (series / "seed-8", single))
    assert first.replace(str(series / "seed-8"), str(single)) == second


def test_all_runs_decode_their_images_once(tmp_path, stripes, tiny_vit, monkeypatch):
    """Tested without the disk cache."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_CIFAR_CACHE", str(tmp_path / "file" / "cache"))
    written, original = [], PixelFile.write
    monkeypatch.setattr(
        PixelFile,
        "write",
        lambda self, row, image: written.append(row) or original(self, row, image),
    )
    flags = ("--seeds", "2", "--do_predict", "--check_leakage")
    assert main(["finetune", *arguments(tmp_path / "runs", stripes, tiny_vit, *flags)]) == 0
    assert len(written) == 80 + 22  # train and validation, and test
    written.clear()
    folder = str(tmp_path / "runs" / "seed-7")
    assert main(["evaluate", "--model_name_or_path", folder, "--split", "test", "--use_cpu"]) == 0
    assert len(written) == 22


def test_all_runs_share_one_split(series):
    facts = [json.loads((series / f"seed-{n}" / "run.json").read_text()) for n in (7, 8)]
    assert facts[0]["split_hash"] == facts[1]["split_hash"]


def test_mean_spread_and_interval_are_those_of_the_runs(series):
    summary = json.loads((series / "seeds.json").read_text())
    assert (summary["seeds"], summary["runs"]) == ([7, 8], ["seed-7", "seed-8"])
    assert summary["num_images"] == {"validation": 8, "test": 22}
    for split in ("validation", "test"):
        values = [metrics(series / f"seed-{n}")[split]["cross_entropy"] for n in (7, 8)]
        row = summary["metrics"][split]["cross_entropy"]
        assert row["values"] == values and row["num_runs"] == 2
        assert row["mean"] == pytest.approx(np.mean(values))
        assert row["std"] == pytest.approx(abs(values[0] - values[1]) / np.sqrt(2))
        low, high = row["interval"]
        assert high - low == pytest.approx(2 * 12.7062 * row["std"] / np.sqrt(2), rel=1e-4)
    table = render_seeds(summary)
    assert "test, 22 images" in table and "seeds: 7, 8" in table
    assert f"{summary['metrics']['test']['accuracy']['mean']:.4f}" in table


def test_an_interrupted_series_resumes(series, tmp_path, stripes, tiny_vit, capsys):
    """The first run is kept, the second resumes from a checkpoint, the third starts from the beginning."""
    again = tmp_path / "runs"
    shutil.copytree(series, again)
    shutil.rmtree(again / "seed-8" / "checkpoint-18")
    for name in ("run.json", "metrics.json", "model.safetensors", "config.json"):
        (again / "seed-8" / name).unlink()
    (again / "seed-9").mkdir()
    shutil.copy(again / "seed-8" / "config.yaml", again / "seed-9")
    text = (again / "seed-9" / "config.yaml").read_text()
    (again / "seed-9" / "config.yaml").write_text(text.replace("seed: 8", "seed: 9"))
    before = (again / "seed-7" / "run.json").stat().st_mtime_ns
    argv = arguments(again, stripes, tiny_vit, "--seeds", "3", "--do_predict")
    assert main(["finetune", *argv]) == 2
    assert "holds runs with --seeds" in capsys.readouterr().err
    assert main(["finetune", *argv, "--resume_from_checkpoint", "last"]) == 0
    assert "seeds: 7, 8, 9" in capsys.readouterr().out
    assert (again / "seed-7" / "run.json").stat().st_mtime_ns == before
    assert weights(again / "seed-8") == weights(series / "seed-8")
    assert json.loads((again / "seed-9" / "run.json").read_text())["steps"] == 18
    assert len(json.loads((again / "seeds.json").read_text())["runs"]) == 3


def test_a_finished_series_adds_missing_test_metrics(series, tmp_path, stripes, tiny_vit):
    again = tmp_path / "runs"
    shutil.copytree(series, again)
    before = metrics(again / "seed-8")
    (again / "seed-8" / "metrics.json").write_text(json.dumps({"validation": before["validation"]}))
    flags = ("--seeds", "2", "--do_predict", "--resume_from_checkpoint", "last")
    finetune_seeds(config(again, stripes, tiny_vit, *flags))
    assert metrics(again / "seed-8") == before
    assert (again / "seeds.json").read_text() == (series / "seeds.json").read_text()


def test_all_runs_use_the_setting_of_the_first(series, tmp_path, stripes, tiny_vit):
    again = tmp_path / "runs"
    shutil.copytree(series, again)
    path = again / "seed-7" / "config.yaml"
    path.write_text(path.read_text().replace("channels_last", "contiguous"))
    shutil.rmtree(again / "seed-8")
    flags = ("--seeds", "2", "--do_predict", "--resume_from_checkpoint", "last")
    finetune_seeds(config(again, stripes, tiny_vit, *flags))
    saved = RunConfig.load(again / "seed-8" / "config.yaml").train
    assert (saved.precision, saved.memory_format) == ("fp32", "contiguous")


LAST = ("--resume_from_checkpoint", "last")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--push_to_hub"], "--push_to_hub pushes one model"),
        (["--resume_from_checkpoint", "x/checkpoint-9"], "not from a single checkpoint"),
        (["--seeds", "0"], "--seeds is 0; it must be in 1"),
        (["--seed", str(2**32 - 1)], "--seed is 4294967296; it must be in"),
        ([], "holds runs with --seeds"),
        (["--seeds", "1"], "holds runs with --seeds"),
        (["--num_train_epochs", "3", *LAST], r"--num_train_epochs is 3, but the finished run in"),
        (["--flip", "0.1", *LAST], "--flip is 0.1, but the run in .*seed-7 started with 0.5"),
    ],
)
def test_invalid_options_are_refused_before_the_first_run(
    series, stripes, tiny_vit, flags, message
):
    before = {path: path.stat().st_mtime_ns for path in series.rglob("*")}
    with pytest.raises(UserError, match=message):
        requested = config(series, stripes, tiny_vit, "--seeds", "2", "--do_predict", *flags)
        finetune_seeds(requested) if requested.train.seeds > 1 else finetune_classifier(requested)
    assert {path: path.stat().st_mtime_ns for path in series.rglob("*")} == before


def test_a_series_is_refused_in_the_folder_of_a_single_run(single, stripes, tiny_vit):
    for flags in ((), LAST):
        with pytest.raises(UserError, match=r"holds (another|a single) run"):
            finetune_seeds(config(single, stripes, tiny_vit, "--seeds", "2", *flags))


def test_the_main_path_refuses_multiple_seeds(tmp_path, stripes, tiny_vit):
    with pytest.raises(UserError, match="--seeds 2 is for finetune_seeds"):
        finetune_classifier(config(tmp_path / "run", stripes, tiny_vit, "--seeds", "2"))
