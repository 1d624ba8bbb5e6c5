"""Tiny runs, compared step by step with frozen reference values.

Refactoring must pass. After an intended change of results, `pytest tests/invariants --write-references`
rewrites the references and prints the differences.
"""

import hashlib
import json
import platform
import signal
from pathlib import Path

import pytest
import scipy
import torch
import transformers
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_cifar import RunConfig, finetune_classifier

OPTIONS = [
    "--use_cpu", "--precision", "fp32", "--disable_tqdm", "true", "--logging_steps", "1",
    "--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--train_val_split", "0.25",
]  # fmt: skip
# Data, model, options. Learning rate, clipping, weight decay, warm-up, schedule, label smoothing, shift, flip
# and calibration are left at their defaults.
RUNS = {
    "cnn": [
        "images", "scratch/article_cnn", "--rotation", "10", "--color_jitter", "0.2", "--mixup_alpha", "0.4",
        "--random_erasing", "0.25", "--ema_decay", "0.9", "--learning_rate", "3.54e-4",
    ],
    "vit": [
        "images", "vit", "--crop_scale", "0.5", "--auto_augment", "trivial_augment", "--layer_decay", "0.7",
        "--gradient_accumulation_steps", "2", "--metric_for_best_model", "cross_entropy",
        "--probe_images", "0",  # a solved head differs more between processors
    ],
    "frozen": [
        "images", "vit", "--freeze", "backbone", "--feature_views", "2", "--learning_rate", "7.07e-4",
    ],
    "multi_label": ["lights", "resnet", "--cutmix_alpha", "1", "--probe_images", "0"],
    "stream": [
        "shards", "scratch/article_cnn", "--streaming", "--max_eval_samples", "12",
        "--dataloader_num_workers", "2", "--load_best_model_at_end", "false", "--learning_rate", "3.54e-4",
    ],
}  # fmt: skip
STOPS = {"cnn": 13, "vit": 7}  # steps in mid-epoch, of 18 and 10
# Relative plus absolute. Values with SSE4, AVX2 and AVX512, and with torch 2.11 and 2.15, differ by at most
# 2.3e-7.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def run(saved, same_everywhere):
    """A function that runs one of RUNS in a folder."""

    def run_in(folder, name, *options):
        data, model, *own = RUNS[name]
        named = ["--dataset_name", saved(data), "--model_name_or_path", saved(model)]
        argv = [*named, "--output_dir", str(folder), *OPTIONS, *own, *options]
        finetune_classifier(RunConfig.parse(argv))

    return run_in


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A function that returns the facts of one of RUNS, run at the first call."""
    root, facts = tmp_path_factory.mktemp("runs"), {}

    def facts_of(name):
        if name not in facts:
            run(root / name, name)
            facts[name] = read_facts(root / name)
        return facts[name]

    return facts_of


def read_facts(folder):
    """Return the facts of a finished run, in the form of a reference file."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    metrics = json.loads((folder / "metrics.json").read_text())["validation"]
    return {
        "split": {"hash": json.loads((folder / "run.json").read_text())["split_hash"]},
        "steps": {
            str(record["step"]): {
                name: record[name] for name in ("loss", "grad_norm", "learning_rate")
            }
            for record in log
            if "loss" in record
        },
        "evaluations": {
            str(record["step"]): {
                name: value
                for name, value in record.items()
                if name.startswith("eval_") and not name.endswith(("_runtime", "_second"))
            }
            for record in log
            if "eval_loss" in record
        },
        "metrics": dict(leaves(metrics)),
        "weights": {"sha256": weights_hash(folder / "model.safetensors"), "made_with": machine()},
    }


def leaves(values, prefix=""):
    """Return names and values of the leaves of nested dicts and lists."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for name, value in items:
        if isinstance(value, (dict, list)):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def weights_hash(path):
    """Return the SHA-256 of the bytes of all tensors, by sorted name."""
    sha, tensors = hashlib.sha256(), load_file(path)
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].numpy().tobytes())
    return sha.hexdigest()


def machine():
    """Return the facts that the last bit of a sum may depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scipy": scipy.__version__,
    }


def differences(wanted, found, tolerance=0.0):
    """Return a line for each leaf that is missing, new, or differs by more than the tolerance."""
    wanted, found = dict(leaves(wanted)), dict(leaves(found))
    return [
        f"{name}: {before} before, {now} now"
        for name in wanted | found
        for before, now in [(wanted.get(name, "missing"), found.get(name, "missing"))]
        if not is_close(before, now, tolerance)
    ]


def is_close(before, now, tolerance):
    if isinstance(before, (int, float)) and isinstance(now, (int, float)):
        return abs(now - before) <= tolerance * (1 + abs(before))
    return before == now


def reference_path(name):
    return Path(__file__).with_name(f"{name}.json")


@pytest.fixture
def reference(request, record_property, finished):
    """A function that returns the reference of a run; with --write-references, it writes it first."""

    def read(name):
        path = reference_path(name)
        if request.config.getoption("--write-references", False):
            text = render(finished(name))
            if path.exists():
                changed = differences(json.loads(path.read_text()), json.loads(text))
                shown = [f"{len(changed)} changes", *(f"  {line}" for line in changed[:20])]
            else:
                shown = ["new"]
            path.write_text(text)
            record_property("reference", f"{path.name}: " + "\n".join(shown))
        return json.loads(path.read_text())

    return read


def render(facts):
    """Return facts as JSON, with a line for each step and each metric."""
    parts = []
    for name, part in facts.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in part.items()]
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_norms_equal_the_reference(name, finished, reference):
    wanted, found = (facts | {"weights": {}} for facts in (reference(name), finished(name)))
    assert differences(wanted, found, TOLERANCE) == []


@pytest.mark.parametrize("name", RUNS)
def test_weights_are_bit_identical_to_the_reference(name, finished, same_everywhere):
    wanted = json.loads(reference_path(name).read_text())["weights"]
    elsewhere = differences(wanted["made_with"], machine())
    if elsewhere:
        pytest.skip(f"only the numbers can be compared here: {'; '.join(elsewhere)}")
    assert finished(name)["weights"]["sha256"] == wanted["sha256"]


class StopAt(TrainerCallback):
    """Sends the signal that a scheduler uses to end a job."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("name", STOPS)
def test_a_run_stopped_in_mid_epoch_ends_like_an_uninterrupted_one(
    name, run, finished, tmp_path, monkeypatch
):
    callbacks = transformers.trainer.DEFAULT_CALLBACKS
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop = StopAt(STOPS[name])
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*callbacks, stop])
        run(tmp_path, name)
    assert not (tmp_path / "model.safetensors").exists()
    run(tmp_path, name, "--resume_from_checkpoint", "last")
    resumed, undisturbed = read_facts(tmp_path), finished(name)
    unrecorded = str(STOPS[name])  # the signal comes between a step and its record
    assert undisturbed["steps"].keys() - resumed["steps"].keys() == {unrecorded}
    resumed["steps"][unrecorded] = undisturbed["steps"][unrecorded]
    assert resumed == undisturbed
