"""hf_cifar.studies.kfold: a run for each fold, and all their predictions together."""

import json
import re
import shutil

import numpy as np
import pytest
from tiny import tiny_options

from hf_cifar import RunConfig, UserError, finetune_classifier
from hf_cifar.cli import main
from hf_cifar.evaluation.predictions import Predictions
from hf_cifar.runs.folder import RunFolder
from hf_cifar.studies.kfold import cross_validate, render_folds
from hf_cifar.studies.student import student_of


def options(folder, data, model, *flags):
    return tiny_options(folder, data, model, "--seed", "7", *flags)


def config(*args):
    return RunConfig.parse(options(*args))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def study(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("kfold") / "study"
    cross_validate(config(folder, stripes, tiny_vit, "--do_predict"), folds=3)
    return folder


def test_a_fold_is_the_single_run_with_its_options(study, tmp_path, stripes, tiny_vit):
    flags = ("--do_predict", "--num_folds", "3", "--fold", "2")
    finetune_classifier(config(tmp_path / "run", stripes, tiny_vit, *flags))
    assert weights(study / "fold-2") == weights(tmp_path / "run")
    first, second = ((f / "config.yaml").read_text() for f in (study / "fold-2", tmp_path / "run"))
    assert first.replace(str(study / "fold-2"), str(tmp_path / "run")) == second


def test_every_row_is_predicted_once_by_the_run_that_did_not_see_it(study):
    pooled = Predictions.load(study, "out_of_fold")
    assert pooled.row_ids.tolist() == list(range(80))
    seen = 0
    for fold in (1, 2, 3):
        own = Predictions.load(study / f"fold-{fold}", "validation")
        np.testing.assert_array_equal(pooled.logits[own.row_ids], own.logits)
        np.testing.assert_array_equal(pooled.labels[own.row_ids], own.labels)
        seen += len(own.row_ids)
    assert seen == 80
    assert RunFolder(study).metrics()["out_of_fold"] == pooled.metrics


def test_summary_is_that_of_the_runs(study):
    summary = json.loads((study / "folds.json").read_text())
    runs = [json.loads((study / f"fold-{n}" / "metrics.json").read_text()) for n in (1, 2, 3)]
    assert summary["num_images"] == [27, 27, 26]
    for split in ("validation", "test"):
        values = [run[split]["accuracy"] for run in runs]
        found = summary["metrics"][split]["accuracy"]
        assert found["values"] == values
        assert found["mean"] == pytest.approx(np.mean(values))
        assert found["std"] == pytest.approx(np.std(values, ddof=1))
    table = render_folds(study)
    assert "out of fold, 80 images" in table and "mean of 3 runs" in table
    pooled = RunFolder(study).metrics()["out_of_fold"]["accuracy"]
    assert f"{pooled:.4f}" in table


def test_the_report_shows_the_predictions_and_the_folds(study):
    page = (study / "report.html").read_text()
    assert "Each image was predicted by a model that was not trained on it." in page
    assert "Accuracy by fold" in page and "3 training runs" in page
    assert main(["report", str(study)]) == 0
    assert (study / "report.html").read_text() == page


def test_the_same_command_continues(study, tmp_path, stripes, tiny_vit, capsys):
    again = tmp_path / "study"
    shutil.copytree(study, again)
    for name in ("run.json", "metrics.json", "model.safetensors", "config.json"):
        (again / "fold-2" / name).unlink()
    shutil.rmtree(again / "fold-2" / "checkpoint-14")
    shutil.rmtree(again / "fold-3")
    for name in ("folds.json", "metrics.json", "report.html", "config.yaml"):
        (again / name).unlink()
    kept = (again / "fold-1" / "run.json").stat().st_mtime_ns
    argv = ["kfold", "--folds", "3", *options(again, stripes, tiny_vit, "--do_predict")]
    assert main(argv) == 0
    assert "out of fold, 80 images" in capsys.readouterr().out
    assert (again / "fold-1" / "run.json").stat().st_mtime_ns == kept
    for fold in (2, 3):
        assert weights(again / f"fold-{fold}") == weights(study / f"fold-{fold}")
    for name in ("folds.json", "metrics.json"):
        assert (again / name).read_text() == (study / name).read_text()


@pytest.fixture(scope="module")
def taught(study, tmp_path_factory, stripes, tiny_vit):
    """The same study with a student, whose options a file has, and the command line."""
    folder = tmp_path_factory.mktemp("taught")
    shutil.copytree(study, folder / "study")
    file = folder / "student.yaml"
    file.write_text(
        "model_name_or_path: scratch/article_cnn\nnum_train_epochs: 3\nflip: 0\ncrop_padding: 0\n"
    )
    flags = ["--do_predict", "--folds", "3", "--distill_into", str(file)]
    argv = ["kfold", *options(folder / "study", stripes, tiny_vit, *flags)]
    assert main(argv) == 0
    return folder / "study", argv


def test_a_student_learns_from_the_ensemble_of_the_folds(taught, study, capsys):
    folder, argv = taught
    for fold in (1, 2, 3):
        assert weights(folder / f"fold-{fold}") == weights(study / f"fold-{fold}")
    assert main(argv) == 0  # everything is kept
    shown = capsys.readouterr().out
    assert re.search(r"test +mean of 3 runs +std +ensemble +student", shown)
    student = RunFolder(folder / "student")
    options = student.load_config()
    assert options.model.model_name_or_path == "scratch/article_cnn"
    assert (options.train.num_train_epochs, options.train.learning_rate) == (3, 5e-3)
    assert options.data.num_folds is None
    assert student.facts()["teacher"] == {"name": "ensemble", "has_seen_validation": True}
    assert student.facts()["num_train"] == 72
    page = (folder / "report.html").read_text()
    assert '<th scope="row">student</th>' in page
    for name in ("ensemble", "student"):
        assert f"{RunFolder(folder / name).metrics()['test']['accuracy']:.4f}" in shown


def test_an_interrupted_student_has_the_same_bits(taught, tmp_path, stripes, tiny_vit):
    folder, argv = taught
    again = tmp_path / "study"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "ensemble")
    for name in ("run.json", "metrics.json", "model.safetensors"):
        (again / "student" / name).unlink()
    last = max((again / "student").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    shutil.rmtree(last)
    # The folder of the study is in the options of its runs.
    place = argv.index("--output_dir") + 1
    for run in (*again.glob("fold-*"), again / "student"):
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace(str(folder), str(again)))
    assert main([*argv[:place], str(again), *argv[place + 1 :]]) == 0
    assert weights(again / "student") == weights(folder / "student")


def test_test_may_be_evaluated_later(taught, tmp_path, capsys):
    """The ensemble of an earlier start without --do_predict has no metrics on test."""
    folder, argv = taught
    again = tmp_path / "study"
    shutil.copytree(folder, again)
    for run in (*again.glob("fold-*"), again / "student"):
        text = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(text.replace(str(folder), str(again)))
    for run in (again / "ensemble", again / "student"):
        metrics = RunFolder(run).metrics()
        metrics.pop("test")
        (run / "metrics.json").write_text(json.dumps(metrics))
    folds = json.loads((again / "folds.json").read_text())
    assert set(folds["together"]) == {"ensemble", "student"}
    (again / "folds.json").write_text(json.dumps(folds | {"together": {}}))
    assert "ensemble" not in render_folds(again)
    place = argv.index("--output_dir") + 1
    assert main([*argv[:place], str(again), *argv[place + 1 :]]) == 0
    assert re.search(r"test +mean of 3 runs +std +ensemble +student", capsys.readouterr().out)
    assert weights(again / "student") == weights(folder / "student")


def test_the_data_of_a_student_are_those_of_the_folds(tmp_path, stripes, tiny_vit):
    argv = options(tmp_path / "study", stripes, tiny_vit)
    file = tmp_path / "other.yaml"
    file.write_text("dataset_name: elsewhere\noutput_dir: elsewhere\nnum_train_epochs: 7\n")
    student = student_of(str(file), argv, "hf-cifar kfold")
    assert student.data == RunConfig.parse(argv).data
    assert student.train.output_dir == str(tmp_path / "study" / "student")
    assert student.train.num_train_epochs == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distill_into", "nowhere.yaml"], "--config: no file nowhere.yaml"),
        (
            ["--distill_into", "artcle_cnn"],
            r"--distill_into: artcle_cnn .* \(nearest: article_cnn\)",
        ),
        (["--folds", "1"], "--folds is 1; it must be at least 2"),
        (["--num_folds", "3"], "--num_folds does not work with hf-cifar kfold"),
        (["--seeds", "2"], "--seeds does not work with hf-cifar kfold"),
        (["--push_to_hub"], "--push_to_hub pushes one model"),
        (["--folds", "4"], "--num_folds is 4, but the run in .*fold-1 started with 3"),
        (["--flip", "0.1"], "--flip is 0.1, but the run in .*fold-1 started with 0.5"),
        (["--num_train_epochs", "3"], "--num_train_epochs is 3, but the finished run in"),
        (["--job", "hf_jobs", "--flavor", "cpu-basic"], "--job hf_jobs submits a single run"),
    ],
)
def test_mistakes_are_one_line_and_change_nothing(study, stripes, tiny_vit, flags, message, capsys):
    before = {path: path.stat().st_mtime_ns for path in study.rglob("*")}
    argv = options(study, stripes, tiny_vit, "--do_predict")
    assert (
        main(["kfold", *argv, *(["--folds", "3"] if "--folds" not in flags else []), *flags]) == 2
    )
    assert re.search(message, capsys.readouterr().err)
    assert {path: path.stat().st_mtime_ns for path in study.rglob("*")} == before


def test_a_folder_of_folds_is_refused_for_a_run(study, stripes, tiny_vit):
    with pytest.raises(UserError, match="holds runs of hf-cifar kfold"):
        finetune_classifier(config(study, stripes, tiny_vit))


def test_multiple_labels(tmp_path, tiny_vit, lights):
    folder = tmp_path / "study"
    cross_validate(config(folder, lights, tiny_vit, "--max_steps", "2"), folds=2)
    pooled = Predictions.load(folder, "out_of_fold")
    assert pooled.multi_label and len(np.unique(pooled.row_ids)) == len(pooled.row_ids)


def test_slurm_gets_a_task_for_each_fold(tmp_path, stripes, tiny_vit, capsys):
    argv = options(tmp_path / "study", stripes, tiny_vit)
    assert main(["kfold", "--folds", "3", *argv, "--job", "slurm", "--dry_run"]) == 0
    sent = capsys.readouterr().out
    assert "--array=0-2" in sent and "--num_folds 3 --fold 3" in sent
    assert "-m hf_cifar kfold --folds 3" in sent
    assert (
        main(
            [
                "kfold",
                "--folds",
                "3",
                "--distill_into",
                "article_cnn",
                *argv,
                "--job",
                "slurm",
                "--dry_run",
            ]
        )
        == 0
    )
    assert "-m hf_cifar kfold --folds 3 --distill_into article_cnn" in capsys.readouterr().out
    assert not (tmp_path / "study").exists()
