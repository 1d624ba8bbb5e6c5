"""Rows 33 and 34, and no network at all: the unmodified client with a failing Hub on the loopback."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from command_lines import run_commands
from hub_server import DROP, TOKEN, Hub, hub_environment
from PIL import Image
from safetensors.torch import load_file

# Row 33. Faults in the order of the requests; the next download of a file succeeds.
DOWNLOADS = """
import json, os, shutil, sys
from pathlib import Path
from hub_server import CUT, DROP, FLIP, Hub
model, data, home = map(Path, sys.argv[1:])
hub = Hub()
os.environ["HF_ENDPOINT"] = hub.endpoint
import datasets
from hf_cifar.data.sources import open_data_set
from hf_cifar.errors import UserError
from hf_cifar.models.files import model_folder
from hf_cifar.config.data import DataConfig
datasets.disable_progress_bars()
FAULTS = (
    [429], [500], [503], [DROP], [CUT], [FLIP], [CUT, FLIP], [DROP, FLIP], [429, FLIP], [FLIP] * 2,
    [FLIP] * 3, [CUT] * 2,
)
FILES = [("model", file) for file in ("config.json", "preprocessor_config.json", "model.safetensors")]
FILES += [("data", file) for file in ("README.md", "data/train-00001-of-00004.parquet")]

def load(kind):
    if kind == "model":
        folder = model_folder("me/model", None, False)
        names = [path.name for path in model.iterdir()]
        return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    splits = open_data_set(DataConfig(dataset_name="me/data")).splits
    names = splits["train"].features["label"].names
    plain = splits.cast_column("img", datasets.Image(decode=False))
    return {"names": names} | {split: plain[split][:] for split in ("train", "test")}

results = []
with hub:
    hub.fill("models", "me/model", model)
    hub.fill("datasets", "me/data", data)
    good = {kind: load(kind) for kind in ("model", "data")}
    for faults in FAULTS:
        for kind, file in FILES:
            for folder in ("hub", "datasets"):
                shutil.rmtree(home / folder, ignore_errors=True)
            hub.faults["download", f"me/{kind}/{file}"] = list(faults)
            try:
                message = None if load(kind) == good[kind] else "used what was not published"
            except UserError as error:
                message = str(error)
            left = hub.faults.pop(("download", f"me/{kind}/{file}"))
            again = load(kind) == good[kind]
            results.append([file, faults, message, len(left), again])
print(json.dumps(results))
"""


def test_nothing_damaged_is_used(record_result, tiny_vit, shards, tmp_path):
    home = tmp_path / "home"
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOADS, str(tiny_vit), str(shards), str(home)],
        env=hub_environment(home, "set below") | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results, good = json.loads(done.stdout.splitlines()[-1]), 0
    for file, faults, message, left, again in results:
        right = again and (
            message is None
            or ("\n" not in message and "me/" in message and "used what" not in message)
        )
        good += right and left < len(faults)
        print(*(() if right else ("WRONG",)), file, faults, message, left, again)
    recovered = sum(message is None for _, _, message, _, _ in results)
    print(f"{recovered} of {len(results)} recovered by themselves")
    record_result(
        33,
        "a Hub that fails, disconnects and flips bits",
        "nothing damaged is used",
        good,
        len(results),
    )


PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def obey_permissions():
    """Drop root's capability to write to read-only folders."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            assert libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0


def test_offline_with_a_read_only_cache(record_result, tiny_vit, stripes, shards, tmp_path):
    """All files come from a read-only cache."""
    home, run = tmp_path / "home", tmp_path / "run"
    finetune = ["finetune", "--model_name_or_path", "me/model", "--dataset_name", "me/data"]
    finetune += ["--num_train_epochs", "1", "--output_dir"]
    predict = ["predict", "--model_name_or_path", "me/model", str(next(stripes.rglob("*.png")))]
    evaluate = ["evaluate", "--model_name_or_path", str(run), "--split", "test"]
    with Hub() as hub:
        hub.fill("datasets", "me/data", shards)
        hub.fill("models", "me/model", tiny_vit)
        environment = hub_environment(home, hub.endpoint)
        online = run_commands([(None, [*finetune, str(run)]), (None, predict)], environment)
    assert [command.status for command in online] == [0, 0], online
    files = [path for path in [home, *home.rglob("*")] if not path.is_symlink()]
    for path in files:
        path.chmod(path.stat().st_mode & 0o555)
    try:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_CIFAR_CACHE": str(tmp_path / "cache")}
        commands = [(None, predict), (None, evaluate), (None, [*finetune, str(tmp_path / "again")])]
        offline = run_commands(commands, environment, preexec_fn=obey_permissions)
    finally:
        for path in files:
            path.chmod(path.stat().st_mode | 0o200)
    for command in offline:
        print(command.status, command.stderr[-500:])
    assert offline[0].stdout == online[1].stdout
    good = sum(command.status == 0 for command in offline)
    record_result(
        33,
        "offline, with a read-only cache",
        "every command works",
        good,
        len(offline),
    )


# Row 34. Faults from the final push on: (action, statuses); ALWAYS means every time.
ALWAYS = 30
PUSH_FAULTS = {
    "no longer allowed": ("write", [403] * ALWAYS),
    "token no longer valid": ("write", [401] * ALWAYS),
    "gone": ("write", [DROP] * ALWAYS),
    "no repository, failing": ("create", [None] + [500] * ALWAYS),
    "refuses the files": ("preupload", [403]),
    "refuses the weights": ("lfs", [403]),
    "storage refuses the weights": ("upload", [403] * ALWAYS),
    "refuses the commit": ("commit", [403]),
    "another commit": ("commit", [409]),
    "too large": ("commit", [413]),
    "commit fails": ("commit", [500] * ALWAYS),
    "commit disconnects": ("commit", [DROP] * ALWAYS),
    "rate limit": ("commit", [429] * ALWAYS),
}


def test_a_push_that_fails_leaves_the_model(record_result, tmp_path):
    root, commands = tmp_path / "private", []
    with Hub() as hub:
        for i, (name, (action, faults)) in enumerate(PUSH_FAULTS.items()):
            repo_id = f"me/repo{i}"
            hub.faults[action, repo_id] = list(faults)
            argv = [
                "finetune", "--dataset_name", "bundled/digits", "--max_train_samples", "40",
                "--max_eval_samples", "20", "--model_name_or_path", "scratch/article_mlp", "--image_size",
                "8", "--num_train_epochs", "1", "--precision", "fp32", "--memory_format", "contiguous",
                "--push_to_hub", "--hub_model_id", repo_id, "--output_dir", str(root / name),
                "--seed", str(i),  # other weights: none are on the Hub already
            ]  # fmt: skip
            by_flag = i % 2 == 0
            commands.append((None, [*argv, "--hub_token", TOKEN]) if by_flag else (TOKEN, argv))
        environment = hub_environment(tmp_path / "home", hub.endpoint)
        done = run_commands(commands, environment, timeout=900)
        commits = [repo.num_commits for repo in hub.repos.values()]
    leaked = {
        path.name
        for path in root.rglob("*")
        if path.is_file() and TOKEN.encode() in path.read_bytes()
    }
    good = 0
    for name, command in zip(PUSH_FAULTS, done, strict=True):
        folder, line = root / name, command.stderr.splitlines()[-1]
        right = command.status == 2 and line.startswith("hf-cifar: error: ")
        right &= "Traceback" not in command.stderr
        right &= f"the model is saved in {folder}" in line and "retry with: hf-cifar push" in line
        right &= (
            bool(load_file(folder / "model.safetensors")) and (folder / "metrics.json").is_file()
        )
        right &= not re.search(r"hf_l\w+", command.stdout + command.stderr)
        good += right
        print(*(() if right else ("WRONG",)), name, f"{command.seconds:.1f} s", line)
    assert not any(commits) and not leaked
    requirement = "model saved, exit status 2, no token printed"
    record_result(34, "a push that fails at each of its requests", requirement, good, len(done))


# No network at all


def no_network():
    """Return a command prefix that removes network and loopback; () if that is not permitted."""
    wrapper = ("unshare", "--net")
    allowed = shutil.which("unshare") and not subprocess.run([*wrapper, "true"]).returncode
    return wrapper if allowed else ()


def test_without_network_no_command_waits(record_result, tiny_vit, stripes, tmp_path):
    image = tmp_path / "image.png"
    Image.new("RGB", (16, 16)).save(image)
    run, out = str(tmp_path / "run"), ["--output_dir", str(tmp_path / "new")]
    digits, local = ["--dataset_name", "bundled/digits"], ["--dataset_name", str(stripes)]
    model = ["--model_name_or_path", str(tiny_vit), "--num_train_epochs", "1"]
    hub_model = ["--model_name_or_path", "them/model"]
    prepare = ["finetune", *local, *model, "--output_dir", run]
    goes_on, fails = 0, 2
    commands = [  # name, and command line
        (goes_on, prepare),
        (goes_on, ["evaluate", "--model_name_or_path", run, "--split", "test"]),
        (goes_on, ["predict", "--model_name_or_path", run, str(image)]),
        (goes_on, ["report", run]),
        (fails, ["compare", run, run]),  # one run, not two
        (goes_on, ["runs", run]),
        (goes_on, ["recipes"]),
        (fails, ["finetune", *out]),
        (fails, ["finetune", *out, *digits]),
        (fails, ["finetune", *out, *model]),
        (fails, ["finetune", *out, *model, "--streaming"]),
        (fails, ["finetune", *out, *local, *model, "--push_to_hub"]),
        (fails, ["evaluate", *hub_model, *digits]),
        (fails, ["predict", *hub_model, str(image)]),
        (fails, ["push", run, "--repo_id", "me/model"]),
        (fails, ["push", run, "--repo_id", "me/model", "--dry_run"]),
    ]
    closed = "http://127.0.0.1:9"  # the discard port: nothing listens there
    environment = hub_environment(tmp_path / "home", closed)
    script = [(TOKEN, argv) for _, argv in commands]
    done = run_commands(script, environment, wrapper=no_network())
    good = 0
    for i, ((status, argv), command) in enumerate(zip(commands, done, strict=True)):
        # The first also imports torch, and trains.
        right = command.status == status and (command.seconds < 10 or i == 0)
        right &= "Traceback" not in command.stderr
        good += right
        shown = command.stderr.strip().splitlines()[-1:] if status else ""
        print(
            *(() if right else ("WRONG",)),
            argv[0],
            command.status,
            f"{command.seconds:.1f} s",
            shown,
        )
    assert not (tmp_path / "new").exists()
    record_result(
        "-", "no network at all", "every command works or fails within 10 s", good, len(done)
    )
