"""Two processes over gloo, launched like a user would, compared with one process."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

pytestmark = pytest.mark.slow  # each starts two processes

ROOT = Path(__file__).parent.parent
CONFIGS = [ROOT / "accelerate_config.yaml", *sorted((ROOT / "configs").glob("*.yaml"))]


def launch(output_dir, data, model, processes, *flags):
    """Run scripts/finetune.py under accelerate, with the same global batch of 8 images."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/cpu.yaml"),
        "--num_processes", str(processes), "--main_process_port", "0", str(ROOT / "scripts/finetune.py"),
        "--dataset_name", str(data), "--model_name_or_path", str(model), "--output_dir", str(output_dir),
        "--per_device_train_batch_size", str(8 // processes), "--per_device_eval_batch_size", "3",
        "--crop_padding", "0", "--flip", "0", "--learning_rate", "1e-3", "--num_train_epochs", "2",
        "--logging_steps", "1", "--do_predict", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if processes == 1:  # with one process, the launcher would still start a process group
        command = [sys.executable, *command[command.index(str(ROOT / "scripts/finetune.py")) :]]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, stripes, tiny_vit):
    root = tmp_path_factory.mktemp("distributed")
    for processes in (1, 2):
        done = launch(root / str(processes), stripes, tiny_vit, processes)
        assert done.returncode == 0, done.stderr
        assert "find_unused_parameters" not in done.stderr
    return root


def log_of(folder, key):
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def test_two_processes_really_ran(runs):
    facts = [json.loads((runs / str(n) / "run.json").read_text()) for n in (1, 2)]
    assert [f["processes"] for f in facts] == [1, 2]
    assert facts[0]["steps"] == facts[1]["steps"]


def test_two_processes_end_with_the_weights_of_one(runs):
    """Same data order, same global batch, no augmentation: equal to float rounding."""
    from safetensors.torch import load_file

    one, two = (load_file(runs / n / "model.safetensors") for n in ("1", "2"))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name


def test_two_processes_learn_the_same_from_a_teacher(tmp_path, stripes, finished_vit):
    """Its outputs are computed before training, by one of them."""
    from safetensors.torch import load_file
    from tiny import tiny_run

    flags = [
        "--teacher",
        str(finished_vit),
        "--distillation_weight",
        "0.9",
        "--num_train_epochs",
        "1",
    ]
    done = launch(tmp_path / "2", stripes, "scratch/article_cnn", 2, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("its outputs are computed once") == 1
    fixed = ["--crop_padding", "0", "--flip", "0", "--learning_rate", "1e-3"]
    batches = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    tiny_run(tmp_path / "1", stripes, "scratch/article_cnn", *flags, *fixed, *batches)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("1", "2"))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name


def test_gradient_norms_are_those_of_one_process(runs):
    one, two = (log_of(runs / n, "grad_norm") for n in ("1", "2"))
    assert len(one) == 18
    assert two[:6] == pytest.approx(one[:6], rel=1e-3)


def test_metrics_are_exact_when_the_split_does_not_divide_evenly(runs):
    """22 test images on 2 processes in batches of 3: the padding of the last batch is not counted."""
    one, two = (json.loads((runs / n / "metrics.json").read_text()) for n in ("1", "2"))
    for split, images in (("validation", 8), ("test", 22)):
        assert two[split]["num_images"] == images
        assert sum(map(sum, two[split]["confusion_matrix"])) == images
        assert two[split]["accuracy"] == one[split]["accuracy"]
        assert two[split]["cross_entropy"] == pytest.approx(one[split]["cross_entropy"], rel=1e-3)


def test_two_processes_stream_different_shards(tmp_path, shards, tiny_vit):
    """Each has half of the 72 images in full batches of 4, and both end with the same model."""
    flags = ("--streaming", "--max_eval_samples", "8")
    done = launch(tmp_path / "run", shards, tiny_vit, 2, *flags)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["processes"], facts["steps"]) == (2, 2 * 9)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]["num_images"] == 8


SHOW_ROWS = """
import json, sys
from pathlib import Path
from tiny import tiny_trainer

folder, *arguments = sys.argv[1:]
trainer = tiny_trainer(folder, *arguments)
loader, epochs = trainer.get_train_dataloader(), []
for epoch in range(2):
    loader.set_epoch(epoch)
    batches = [zip(batch["row_ids"].tolist(), batch["labels"].tolist()) for batch in loader]
    epochs.append([list(batch) for batch in batches])
Path(folder, f"rows-{trainer.args.process_index}.json").write_text(json.dumps(epochs))
"""


@pytest.mark.parametrize("batch_size", [3, 4])
@pytest.mark.parametrize(("balance", "draws"), [("undersample", 9), ("oversample", 36)])
def test_two_processes_together_see_every_class_equally_often(
    balance, draws, batch_size, tmp_path, stripes, tiny_vit
):
    """Of 36 and 9 images. Batches of 2 x 4 do not divide the undersampled epoch: its first rows fill them."""
    (tmp_path / "show_rows.py").write_text(SHOW_ROWS)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/cpu.yaml"),
        "--num_processes", "2", "--main_process_port", "0", str(tmp_path / "show_rows.py"), str(tmp_path),
        str(stripes), str(tiny_vit), "--imbalance_factor", "4", "--class_balance", balance,
        "--per_device_train_batch_size", str(batch_size),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rows-{rank}.json").read_text()) for rank in (0, 1))
    orders = []
    for parts in zip(first, second, strict=True):  # of an epoch
        # In the order of the sampler: a batch of the first process, then one of the second.
        order = [tuple(row) for pair in zip(*parts, strict=True) for batch in pair for row in batch]
        epoch, padding = order[: 2 * draws], order[2 * draws :]
        assert Counter(label for _, label in epoch) == {0: draws, 1: draws}
        assert len(padding) == -len(epoch) % (2 * batch_size)
        assert padding == epoch[: len(padding)]
        if balance == "undersample":
            assert len(set(epoch)) == len(epoch)
        else:
            assert set(Counter(row for row in epoch if row[1] == 0).values()) == {1}
        orders.append(order)
    assert orders[0] != orders[1]


def test_two_processes_agree_on_the_doubted_rows(tmp_path, stripes, tiny_vit):
    """Heads are solved by the first process alone, other models are trained by both together; both processes
    leave out the same rows, or they would not end with the same number of steps."""
    data = tmp_path / "data"
    shutil.copytree(stripes, data)
    for i in range(0, 40, 5):  # wrong labels
        across, down = (data / "train" / name / f"{i:03}.png" for name in ("across", "down"))
        across.rename(data / "spare")
        down.rename(across)
        (data / "spare").rename(down)
    cnn = ["--image_size", "32", "--num_train_epochs", "8", "--learning_rate", "3e-3"]
    for model, flags in ((tiny_vit, []), ("scratch/article_cnn", cnn)):
        folder = tmp_path / Path(model).name
        done = launch(folder, data, model, 2, "--clean_labels", "drop", *flags)
        assert done.returncode == 0, done.stderr
        facts = json.loads((folder / "run.json").read_text())
        rows = facts["doubted_rows"]
        assert facts["processes"] == 2
        assert 0 < rows["num_rows"] == len(rows["row_ids"]) == 72 - facts["num_train"]
        assert done.stderr.count("predicting each of 72 training images") == 1
        assert facts["steps"] == facts["epochs"] * math.ceil(facts["num_train"] / 8)


def test_a_series_with_two_processes_contains_the_single_run(runs, tmp_path, stripes, tiny_vit):
    """The second run of a series equals a single run, although its processes have made another run before."""
    done = launch(tmp_path, stripes, tiny_vit, 2, "--seed", "41", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "seeds.json").read_text())
    assert summary["seeds"] == [41, 42]
    assert done.stdout.count("seeds: 41, 42") == 1
    weights = [f / "model.safetensors" for f in (tmp_path / "seed-42", runs / "2")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


TECHNIQUES = {
    # Two processes move the weights each by the gradient of its own batch, as one does for each of two.
    "sam": (
        ["--sam_rho", "0.5"],
        ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"],
    ),
    "unfreezing": (["--unfreeze_epochs", "0.5", "--optim", "sgd", "--learning_rate", "0.1"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", TECHNIQUES)
def test_two_processes_end_with_the_weights_of_one_with_a_technique(
    name, tmp_path, stripes, tiny_vit
):
    from safetensors.torch import load_file

    flags, of_one = TECHNIQUES[name]
    weights = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = launch(
            folder, stripes, tiny_vit, processes, *flags, *(of_one if processes == 1 else [])
        )
        assert done.returncode == 0, done.stderr
        weights.append(load_file(folder / "model.safetensors"))
        assert json.loads((folder / "run.json").read_text())["steps"] == 18
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=2e-4)


def test_two_processes_race_together(tmp_path, stripes, tiny_vit):
    """All train with the rate that the first one chooses, and end with the bits of a run with that rate."""
    flags = ("--max_steps", "1250", "--save_strategy", "no", "--eval_strategy", "no")
    flags += ("--load_best_model_at_end", "false", "--precision", "fp32", "--learning_rate")
    raced = launch(tmp_path / "raced", stripes, tiny_vit, 2, *flags, "auto")
    assert raced.returncode == 0, raced.stderr
    assert raced.stderr.count("won the race") == 1  # the first process speaks for all
    facts = json.loads((tmp_path / "raced" / "run.json").read_text())
    assert facts["processes"] == 2 and len(facts["race"]["rungs"][0]["rates"]) == 3
    rate = facts["race"]["learning_rate"]
    by_hand = launch(tmp_path / "by_hand", stripes, tiny_vit, 2, *flags, str(rate))
    assert by_hand.returncode == 0, by_hand.stderr
    weights = [tmp_path / name / "model.safetensors" for name in ("raced", "by_hand")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_launch_configuration_parses(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    raw = yaml.safe_load(path.read_text())
    assert config.distributed_type.value == raw["distributed_type"]
    assert config.num_processes == raw["num_processes"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_gpu_configuration_without_a_gpu_is_refused(tmp_path, stripes, tiny_vit):
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "fp16"}
    command = [
        sys.executable, str(ROOT / "scripts/finetune.py"), "--dataset_name", str(stripes),
        "--model_name_or_path", str(tiny_vit), "--output_dir", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    source, error = done.stderr.splitlines()
    assert source.startswith("stripes") and "fp16 needs a GPU" in error
    assert not (tmp_path / "run").exists()


def test_adapters_of_two_processes_are_those_of_one(tmp_path, stripes, tiny_vit):
    from safetensors.torch import load_file

    for processes in (1, 2):
        done = launch(tmp_path / str(processes), stripes, tiny_vit, processes, "--lora_rank", "4")
        assert done.returncode == 0, done.stderr
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, two = (load_file(tmp_path / n / file) for n in ("1", "2"))
        assert one.keys() == two.keys()
        for name in one:
            assert torch.allclose(one[name], two[name], atol=2e-4), name


def test_a_run_resumes_on_another_number_of_processes(tmp_path, stripes, tiny_vit):
    """From one process to two, and back: the same images and augmentation, equal to float rounding if the
    batch of a process stays, and the line that says what changed."""
    from safetensors.torch import load_file

    # The last --per_device_train_batch_size counts.
    flags = ("--flip", "0.5", "--crop_padding", "0.125", "--per_device_train_batch_size", "4")
    flags += ("--resume_from_checkpoint", "last", "--save_total_limit", "9", "--precision", "fp32")
    both = tmp_path / "both"
    done = launch(both, stripes, tiny_vit, 2, *flags)
    assert done.returncode == 0, done.stderr
    expected, folder = load_file(both / "model.safetensors"), tmp_path / "one"
    shutil.copytree(both, folder)
    shutil.rmtree(folder / "checkpoint-18")
    done = launch(folder, stripes, tiny_vit, 1, *flags)
    assert done.returncode == 0, done.stderr
    line = "--gradient_accumulation_steps 2 instead of 1, so that a step still has 8 images"
    assert f"resuming with 1 process instead of 2: {line}" in done.stderr
    for name, value in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-4)
    assert log_of(folder, "loss")[9:] == pytest.approx(log_of(both, "loss")[9:], rel=2e-3)
    shutil.rmtree(folder / "checkpoint-18")
    done = launch(folder, stripes, tiny_vit, 2, *flags)
    assert done.returncode == 0, done.stderr
    assert "instead of" not in done.stderr
    assert json.loads((folder / "run.json").read_text())["processes"] == 2
    assert (folder / "model.safetensors").read_bytes() == (both / "model.safetensors").read_bytes()


def test_a_run_of_one_process_resumes_with_two(runs, tmp_path, stripes, tiny_vit):
    """The second process has no random state in the checkpoint, and each has half of the batch."""
    from safetensors.torch import load_file

    shutil.copytree(runs / "1", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-18")
    flags = ("--per_device_train_batch_size", "8", "--resume_from_checkpoint", "last")
    done = launch(tmp_path / "run", stripes, tiny_vit, 2, *flags)
    assert done.returncode == 0, done.stderr
    line = "--per_device_train_batch_size 4 instead of 8, so that a step still has 8 images"
    assert f"resuming with 2 processes instead of 1: {line}" in done.stderr
    one, two = (load_file(f / "model.safetensors") for f in (runs / "1", tmp_path / "run"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=2e-4)


def test_a_step_that_cannot_be_divided_is_refused(tmp_path, stripes, tiny_vit):
    flags = (
        "--per_device_train_batch_size",
        "3",
        "--resume_from_checkpoint",
        "last",
        "--precision",
        "fp32",
    )
    done = launch(tmp_path / "run", stripes, tiny_vit, 1, *flags)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run" / "run.json").unlink()
    done = launch(tmp_path / "run", stripes, tiny_vit, 2, *flags)
    assert done.returncode != 0
    assert "has 3 images, which 2 processes cannot share equally; start 1 process" in done.stderr
