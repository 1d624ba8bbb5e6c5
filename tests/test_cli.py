"""hf_cifar.cli: the commands as a user runs them."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_options

from hf_cifar.cli import COMMANDS, main
from hf_cifar.evaluation.predictions import Predictions


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("cli") / "run"
    flags = ("--num_train_epochs", "15", "--learning_rate", "3e-3")
    status = main(["finetune", *tiny_options(folder, stripes, tiny_vit, *flags)])
    assert status == 0
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_renders(command, capsys):
    try:
        status = main([command, "--help"])
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    assert f"hf-cifar {command}" in capsys.readouterr().out


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_summary_shows_metrics_and_working_code(finished, capsys, stripes, tiny_vit, tmp_path):
    status = main(
        [
            "finetune", "--dataset_name", str(stripes), "--model_name_or_path", str(tiny_vit),
            "--output_dir", str(tmp_path / "run"), "--use_cpu", "--num_train_epochs", "1",
        ]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert status == 0
    accuracy = json.loads((tmp_path / "run" / "metrics.json").read_text())["validation"]["accuracy"]
    assert f"{accuracy:.4f}" in out
    code = out[out.index("from transformers") :]
    code = code.replace("image.png", str(next((stripes / "test").rglob("*.png"))))
    exec(code)
    assert "'label': 'across'" in capsys.readouterr().out


def test_evaluate_takes_data_from_the_run(finished, capsys):
    assert (
        main(["evaluate", "--model_name_or_path", str(finished), "--split", "test", "--use_cpu"])
        == 0
    )
    out = capsys.readouterr().out
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics) == {"validation", "test"}
    assert f"{metrics['test']['accuracy']:.4f}" in out
    assert metrics["test"]["num_images"] == 22


def test_pictures_of_a_report_have_the_names_of_their_files(finished):
    assert main(["report", str(finished)]) == 0
    rows = json.loads((finished / "report.json").read_text())["least_confident_hits"]
    assert rows and all(row["file"].startswith(f"{row['truth']}/") for row in rows)
    assert rows[0]["file"] in (finished / "report.html").read_text()


def test_evaluate_on_other_data_does_not_replace_the_metrics_of_the_run(finished, tmp_path, capsys):
    before = (finished / "metrics.json").read_text()
    argv = [
        "evaluate",
        "--model_name_or_path",
        str(finished),
        "--use_cpu",
        "--max_eval_samples",
        "4",
    ]
    assert main(argv) == 2
    assert "--max_eval_samples requests data other than the run" in capsys.readouterr().err
    assert main([*argv, "--output_dir", str(tmp_path / "other")]) == 0
    other = json.loads((tmp_path / "other" / "metrics.json").read_text())
    assert other["validation"]["num_images"] == 4
    assert (finished / "metrics.json").read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is no need to fall back")
def test_evaluate_takes_bf16_without_a_gpu(stripes, tiny_vit, tmp_path, capsys):
    run, rounded = tmp_path / "run", tmp_path / "rounded"
    # A head that is fitted to stripes has larger logits, which bfloat16 rounds by more.
    flags = ("--num_train_epochs", "15", "--learning_rate", "3e-3", "--probe_images", "0")
    assert main(["finetune", *tiny_options(run, stripes, tiny_vit, *flags)]) == 0
    argv = ["evaluate", "--model_name_or_path", str(run), "--output_dir", str(rounded), "--bf16"]
    assert main(argv) == 0
    exact, rounded = (Predictions.load(f, "validation").logits for f in (run, rounded))
    np.testing.assert_allclose(rounded, exact, atol=0.1)
    assert not np.array_equal(rounded, exact)


def test_predict_prints_json_lines_and_continues_after_a_broken_image(
    finished, stripes, tmp_path, capsys
):
    good = sorted((stripes / "test").rglob("*.png"))
    broken = tmp_path / "broken.png"
    broken.write_bytes(good[0].read_bytes()[:60])
    argv = ["predict", "--model_name_or_path", str(finished), "--batch_size", "4", "--use_cpu"]
    assert main([*argv, str(stripes / "test"), str(broken), str(good[0])]) == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["path"] for r in records] == [*map(str, good), str(broken), str(good[0])]
    assert "cannot read image" in records[-2]["error"]
    right = [r["label"] == Path(r["path"]).parent.name for r in records if "label" in r]
    assert np.mean(right) > 0.8
    for record in (r for r in records if "label" in r):
        assert record["score"] == record["top_k"][0]["score"]
        assert sum(entry["score"] for entry in record["top_k"]) == pytest.approx(1, abs=1e-4)
    assert main([*argv, str(good[0])]) == 0


def test_predict_under_autocast_gives_the_same_labels(finished, stripes, capsys):
    argv = ["predict", "--model_name_or_path", str(finished), "--use_cpu", str(stripes / "test")]
    assert main(argv) == 0
    exact = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main([*argv, "--bf16"]) == 0
    rounded = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["label"] for r in rounded] == [r["label"] for r in exact]
    scores = [[r["score"] for r in records] for records in (exact, rounded)]
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)
    assert main([*argv, "--fp16"]) == 2
    assert "--fp16 needs a GPU" in capsys.readouterr().err
    for command in (argv, ["evaluate", *argv[1:4]]):
        assert main([*command, "--fp16", "--bf16"]) == 2
        assert "cannot be combined" in capsys.readouterr().err


def test_predict_under_autocast_resizes_exactly(finished, stripes, tmp_path, capsys):
    path = next((stripes / "test" / "down").glob("*.png"))
    Image.open(path).resize((40, 24)).save(tmp_path / "other.png")
    argv = ["predict", "--model_name_or_path", str(finished), "--use_cpu", str(tmp_path)]
    scores = []
    for flags in ([], ["--bf16"]):
        assert main([*argv, *flags]) == 0
        scores.append(json.loads(capsys.readouterr().out)["score"])
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


def test_predict_agrees_with_evaluate_for_any_image_size(finished, tmp_path, capsys, stripes):
    """Images are resampled once, at any file size: a doubled image gets the same label."""
    path = next((stripes / "test" / "down").glob("*.png"))
    Image.open(path).resize((32, 32), Image.Resampling.NEAREST).save(tmp_path / "big.png")
    argv = ["predict", "--model_name_or_path", str(finished), "--use_cpu"]
    assert main([*argv, str(path), str(tmp_path / "big.png")]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first["label"] == second["label"]
    assert first["score"] == pytest.approx(second["score"], abs=0.05)


def test_recipes_lists_and_shows(capsys):
    assert main(["recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["recipes", "quickstart"]) == 0
    assert "bundled/digits" in capsys.readouterr().out


MODEL = ["--model_name_or_path", "scratch/article_mlp"]
LAST = ["--resume_from_checkpoint", "last"]
BAD = {
    "command": (["tune"], "unknown command 'tune'"),
    "option": (["finetune", "--learning_rat", "1"], "nearest: --learning_rate"),
    "short option": (["finetune", "--model", "x"], "--model: pass --model_name_or_path"),
    "recipe": (["finetune", "--recipe", "quikstart"], "nearest: quickstart"),
    "recipe shown": (["recipes", "nope"], "unknown recipe 'nope'"),
    "config": (["finetune", "--config", "none.yaml"], "no file none.yaml"),
    "number": (["finetune", "--num_train_epochs", "three"], "--num_train_epochs takes a number"),
    "optimiser": (
        ["finetune", "--optim", "adamw_torh"],
        "does not take 'adamw_torh' (nearest: adamw_torch)",
    ),
    "strategy": (["finetune", "--eval_strategy=never"], "it takes no, steps, epoch"),
    "batch": (["evaluate", "--per_device_eval_batch_size", "0"], "it must be in 1..1048576"),
    "data set": (["finetune", *MODEL, "--dataset_name", "./nowhere"], "no such file or folder"),
    "bundled data set": (
        ["finetune", *MODEL, "--dataset_name", "bundled/letters"],
        "bundled/digits",
    ),
    "hub offline": (
        ["finetune", *MODEL, "--dataset_name", "someone/nothing"],
        "data set someone/nothing is not in the local cache and HF_HUB_OFFLINE",
    ),
    "model": (["finetune", "--model_name_or_path", "./nowhere"], "no model in ./nowhere"),
    "bundled model": (
        ["finetune", "--dataset_name", "bundled/digits", "--model_name_or_path", "bundled/resnet"],
        "bundled/efficientnet_lite0",
    ),
    "hub model offline": (
        ["finetune", "--dataset_name", "bundled/digits", "--model_name_or_path", "someone/nothing"],
        "someone/nothing is neither a folder nor in the cache, and HF_HUB_OFFLINE",
    ),
    "no hub id": (
        ["finetune", "--dataset_name", "bundled/digits", "--model_name_or_path", "a model"],
        "neither a local folder nor a Hub id",
    ),
    "architecture": (
        ["finetune", "--dataset_name", "bundled/digits", "--model_name_or_path", "scratch/resnt18"],
        "nearest: resnet18",
    ),
    "value": (["finetune", "--train_val_split", "2"], "--train_val_split is 2.0"),
    "evaluate without model": (["evaluate"], "--model_name_or_path is missing"),
    "evaluate option": (["evaluate", "--modl", "x"], "unknown option --modl"),
    "predict without files": (["predict", "--model_name_or_path", "{run}"], "no image to predict"),
    "predict nothing": (["predict", "--model_name_or_path", "{run}", "gone.png"], "gone.png"),
    "run folder": (
        ["finetune", "--config", "{run}/config.yaml"],
        "holds another run",
    ),
    "out of range": (
        ["finetune", "--learning_rate", "-1"],
        "--learning_rate is -1; it must be in",
    ),
    "seed": (["finetune", "--seed=-1"], "--seed is -1; it must be in 0..4294967295"),
    "no effect": (["finetune", "--do_train", "false"], "--do_train has no effect here"),
    "metric": (
        ["finetune", "--metric_for_best_model", "f1"],
        "one of accuracy, balanced_accuracy, cross_entropy",
    ),
    "configuration": (
        ["finetune", *MODEL, "--dataset_name", "bundled/digits", "--dataset_config_name", "x"],
        "bundled/digits has one configuration",
    ),
    "article without scratch": (
        ["finetune", "--dataset_name", "bundled/digits", "--model_name_or_path", "article_cnn"],
        "or scratch/article_cnn",
    ),
    "evaluate a model that is not trained": (
        ["evaluate", "--model_name_or_path", "bundled/efficientnet_lite0"],
        "bundled/efficientnet_lite0 is not fine-tuned yet",
    ),
    "evaluate nothing": (
        ["evaluate", "--model_name_or_path", "nowhere"],
        "pass the folder of a run",
    ),
    "optimiser without its package": (
        [
            "finetune",
            *MODEL,
            "--dataset_name",
            "bundled/digits",
            "--optim",
            "lion_8bit",
            "--learning_rate",
            "1e-4",
        ],
        "bitsandbytes",
    ),
    "optimiser without a known rate": (
        ["finetune", *MODEL, "--dataset_name", "bundled/digits", "--optim", "madgrad"],
        "--optim madgrad has no default learning rate for this model; pass --learning_rate auto, or a number",
    ),
    "tracker without its package": (
        ["finetune", *MODEL, "--dataset_name", "bundled/digits", "--report_to", "swanlab"],
        "swanlab",
    ),
    "compiler": (
        ["finetune", *MODEL, "--dataset_name", "bundled/digits", "--torch_compile_backend", "foo"],
        "--torch_compile_backend does not take 'foo'; it takes",
    ),
    "checkpointing": (
        ["finetune", *MODEL, "--dataset_name", "bundled/digits", "--gradient_checkpointing"],
        "ArticleMLPForImageClassification does not support it",
    ),
    "two precisions": (
        ["finetune", *MODEL, "--dataset_name", "bundled/digits", "--bf16", "--precision", "fp32"],
        "--bf16 and --precision fp32 differ",
    ),
    "resume other data": (
        ["finetune", "--config", "{run}/config.yaml", "--split_seed", "1", *LAST],
        "--split_seed is 1, but the run in",
    ),
    "resume another model": (
        ["finetune", "--config", "{run}/config.yaml", *MODEL, *LAST],
        "--model_name_or_path is scratch/article_mlp, but the run in",
    ),
    "resume at another rate": (
        ["finetune", "--config", "{run}/config.yaml", "--learning_rate", "0.5", *LAST],
        "--learning_rate is 0.5, but the run in",
    ),
    "no blocks": (
        ["finetune", *MODEL, "--dataset_name", "bundled/digits", "--layer_decay", "0.5"],
        "ArticleMLPForImageClassification has no stages or blocks",
    ),
    "too small": (
        ["finetune", *MODEL, "--dataset_name", "bundled/digits", "--max_train_samples", "5"],
        "--max_train_samples 5 is less than the 10 classes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_2(case, finished, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, words = BAD[case]
    assert main([part.replace("{run}", str(finished)) for part in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("hf-cifar: error: ")
    assert words in lines[0]
    assert not any(tmp_path.iterdir())


def test_a_broken_image_is_named_before_anything_is_written(tmp_path, stripes, tiny_vit, capsys):
    data = tmp_path / "data"
    for path in (stripes / "train").rglob("*.png"):
        target = data / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    victim = sorted(data.rglob("*.png"))[7]
    victim.write_bytes(victim.read_bytes()[:-40])
    argv = ["--dataset_name", str(data), "--model_name_or_path", str(tiny_vit)]
    assert main(["finetune", *argv, "--output_dir", str(tmp_path / "run")]) == 2
    assert f"train row 7 ({victim}): cannot read image" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_mistakes_and_help_are_found_without_torch(tmp_path):
    """`import hf_cifar` imports no torch, nor does any error that needs no model."""
    code = """
import sys
import hf_cifar
from hf_cifar.cli import main
assert main(["--help"]) == 0
assert main(["finetune", "--learning_rate", "-1"]) == 2
assert main(["finetune", "--learning_rat", "1"]) == 2
assert main(["finetune", "--optim", "adam"]) == 2
model = ["--model_name_or_path", "scratch/resnet18"]
assert main(["finetune", *model, "--dataset_name", "./nowhere"]) == 2
for name in ("./nowhere", "someone/nothing", "scratch/resnt18", "bundled/resnet"):
    assert main(["finetune", "--dataset_name", "bundled/digits", "--model_name_or_path", name]) == 2
assert main(["finetune", *model, "--dataset_name", "bundled/digits", "--max_train_samples", "3"]) == 2
print("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_every_public_name_exists_and_has_a_docstring():
    import hf_cifar

    for name in hf_cifar.__all__:
        text = getattr(hf_cifar, name).__doc__
        # A dataclass or NamedTuple without a docstring gets its signature as one.
        assert text and not text.startswith(f"{name}("), name


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "finetune", "--help"])
def test_closed_pipe_ends_a_command_silently(command, finished, stripes, tiny_vit, tmp_path):
    arguments = {
        "predict": ["--model_name_or_path", str(finished), "--batch_size", "1", "--use_cpu"]
        + [str(stripes / "test")] * 200,
        "finetune": tiny_options(
            tmp_path / "run", stripes, tiny_vit, "--num_train_epochs", "500", "--logging_steps", "1"
        ),
        "--help": [],
    }[command]
    code = "import sys; from hf_cifar.cli import main; sys.exit(main())"
    with subprocess.Popen(
        [sys.executable, "-c", code, command, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        if command != "--help":  # which is printed at once, at the end
            assert process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE, errors
    assert "Traceback" not in errors and "Broken" not in errors
    assert command == "finetune" or errors == ""
