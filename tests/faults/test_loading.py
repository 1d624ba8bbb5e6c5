"""Rows 18, 19 and 21: models and data with malicious or damaged files."""

import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import hub_environment
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf

from hf_cifar.config.data import DataConfig
from hf_cifar.config.deployment import PredictConfig
from hf_cifar.config.model import ModelConfig
from hf_cifar.data.cifar_archives import PYTHON_FILES
from hf_cifar.data.sources import load_source
from hf_cifar.errors import UserError
from hf_cifar.logs import quieten
from hf_cifar.models.build import build_model, load_classifier
from hf_cifar.predict import predict_files

LABELS = {0: "across", 1: "down"}


@pytest.fixture(autouse=True)
def quiet():
    quieten(main_process=True)


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


def saved_by_torch(value, **options):
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def in_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def one_line(error):
    return "\n" not in str(error) and len(str(error)) < 800


# Row 18. Functions that put a payload into a copy of a model's folder.


def without_weights(folder, **files):
    (folder / "model.safetensors").unlink()
    for name, content in files.items():
        (folder / name.replace("__", "-").replace("_dot_", ".")).write_bytes(content)


def write(folder, name, content):
    (folder / name).write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode()
    )


def pytorch_bin(encode):
    def put(folder, payload):
        without_weights(folder)
        write(folder, "pytorch_model.bin", encode({"classifier.weight": payload}))

    return put


def next_to_weights(name, encode=saved_by_torch):
    return lambda folder, payload: write(folder, name, encode(payload))


def instead(name, encode=pickle.dumps):
    return lambda folder, payload: write(folder, name, encode({"weight": payload}))


def indexed(target, index="model.safetensors.index.json"):
    def put(folder, payload):
        without_weights(folder)
        write(folder, index, {"metadata": {}, "weight_map": {"classifier.weight": target}})
        write(folder, target, saved_by_torch({"classifier.weight": payload}))

    return put


def adapter(folder, payload):
    write(
        folder, "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    )
    write(folder, "adapter_model.bin", saved_by_torch({"weight": payload}))


def named_in_config(folder, payload):
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", config | {"transformers_weights": "adapter_model.bin"})
    write(folder, "adapter_model.bin", saved_by_torch({"classifier.weight": payload}))


def timm_checkpoint_path(folder, payload):
    import timm

    shutil.rmtree(folder)
    write_to = folder / "evil.pth"
    model = timm.create_model("test_resnet", num_classes=2)
    save_for_hf(
        model, folder, model_args={"checkpoint_path": str(write_to)}, safe_serialization=True
    )
    write(folder, "evil.pth", saved_by_torch({"state_dict": payload}))


MODELS = {
    "pytorch_model.bin, a bare pickle": pytorch_bin(pickle.dumps),
    "pytorch_model.bin, zipped": pytorch_bin(saved_by_torch),
    "pytorch_model.bin, the older format": pytorch_bin(
        lambda value: saved_by_torch(value, _use_new_zipfile_serialization=False)
    ),
    "pytorch_model.bin, pickle protocol 0": pytorch_bin(lambda value: pickle.dumps(value, 0)),
    "pytorch_model.bin in shards": indexed(
        "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"
    ),
    "pytorch_model.bin next to the weights": next_to_weights("pytorch_model.bin"),
    "model.safetensors, a bare pickle": instead("model.safetensors"),
    "model.safetensors, zipped by torch": instead("model.safetensors", saved_by_torch),
    "an index that lists a pickle": indexed("pytorch_model.bin"),
    "an index that lists a pickle elsewhere": indexed("../evil.bin"),
    "a shard that is a pickle": indexed("model-00001-of-00001.safetensors"),
    "training_args.bin": next_to_weights("training_args.bin"),
    "optimizer.pt": next_to_weights("optimizer.pt"),
    "scheduler.pt": next_to_weights("scheduler.pt"),
    "rng_state.pth": next_to_weights("rng_state.pth"),
    "model.pt2": next_to_weights("model.pt2", pickle.dumps),
    "config.json, a pickle": instead("config.json"),
    "preprocessor_config.json, a pickle": instead("preprocessor_config.json"),
    "an adapter": adapter,
    "weights named in config.json": named_in_config,
    "timm's checkpoint_path": timm_checkpoint_path,
}


def cifar(kind, victim, suffix="", key=None, protocol=2):
    """Return a function that makes an official archive, or its folder. The payload is one of its files, or
    under `key` in one."""

    def make(folder, payload):
        layout = PYTHON_FILES[kind]
        batch = {b"data": np.zeros((2, 3072), np.uint8)}
        batch |= {key: [0, 1] for key in layout["labels"].values()}
        meta = {key: ["a", "b"] for key in layout["meta"][1].values()}
        contents = dict.fromkeys(layout["train"] + layout["test"], batch) | {
            layout["meta"][0]: meta
        }
        contents[victim] = payload if key is None else {**contents[victim], key: payload}
        files = {name: pickle.dumps(value, protocol) for name, value in contents.items()}
        folder.mkdir()
        if suffix:
            mode = "w:gz" if suffix.endswith("gz") else "w"
            return in_tar(folder / f"cifar{suffix}", files, mode)
        for name, content in files.items():
            write(folder, name, content)
        return folder

    return make


def pickled_table(folder, payload):
    write(folder, "train.pkl", pickle.dumps(payload))
    return folder


def web_dataset(folder, payload):
    content = {
        f"{i}.{ending}": pickle.dumps(payload) for i in range(3) for ending in ("pyd", "pth", "npy")
    }
    in_tar(folder / "train-000.tar", content)
    return folder


def among_images(folder, payload):
    for name in LABELS.values():
        (folder / name).mkdir()
        for i in range(4):
            Image.new("RGB", (8, 8)).save(folder / name / f"{i}.png")
        write(folder, f"{name}/labels.pkl", pickle.dumps(payload))
    return folder


def made_in(make):
    """Create the folder first."""

    def make_in(folder, payload):
        folder.mkdir()
        return make(folder, payload)

    return make_in


DATA = {
    "CIFAR-10 batch in a folder": cifar("cifar10", "data_batch_3"),
    "CIFAR-10 test batch in a .tar.gz": cifar("cifar10", "test_batch", ".tar.gz"),
    "CIFAR-10 class names in a .tar": cifar("cifar10", "batches.meta", ".tar"),
    "CIFAR-10 labels, protocol 0": cifar("cifar10", "data_batch_1", key=b"labels", protocol=0),
    "CIFAR-100 batch in a .tgz": cifar("cifar100", "train", ".tgz", key=b"data"),
    "CIFAR-100 class names in a folder": cifar("cifar100", "meta", protocol=4),
    "a pickled table": made_in(pickled_table),
    "a WebDataset": made_in(web_dataset),
    "pickles among images": made_in(among_images),
}


def test_no_payload_runs(record_result, tiny_vit, tmp_path):
    marker = tmp_path / "ran"
    payload = Payload(marker)
    pickle.loads(pickle.dumps(payload))
    assert marker.exists()  # check that the payload works
    marker.unlink()
    quiet = []
    for i, (name, put) in enumerate(MODELS.items()):
        folder = tmp_path / f"model {i}"
        shutil.copytree(tiny_vit, folder)
        put(folder, payload)
        for load in (
            load_classifier,
            lambda f: build_model(ModelConfig(model_name_or_path=f), LABELS),
        ):
            try:
                load(str(folder))
            except UserError as error:
                assert one_line(error), name
        quiet.append(not marker.exists())
        marker.unlink(missing_ok=True)
    for i, (name, make) in enumerate(DATA.items()):
        source = make(tmp_path / f"data {i}", payload)
        try:
            load_source(DataConfig(dataset_name=str(source)))
        except UserError as error:
            assert one_line(error), name
        quiet.append(not marker.exists())
        marker.unlink(missing_ok=True)
    record_result(18, "pickles that run code, in models and data", "none is run", sum(quiet), 30)


# Row 19


def flip_bytes(content, draw):
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 8, 64))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def in_header(content, draw):
    """Change the header of a safetensors file: its length, names, types, shapes and offsets."""
    content = bytearray(content)
    length = int.from_bytes(content[:8], "little")
    for _ in range(draw.choice((1, 1, 4))):
        content[draw.randrange(8 + min(length, len(content) - 8))] = draw.randrange(256)
    return bytes(content)


def cut(content, draw):
    return content[: draw.randrange(len(content))]


def repeat(content, draw):
    start = draw.randrange(len(content))
    return content[:start] + content[start : start + draw.randrange(1, 200)] * draw.randrange(2, 50)


VALUES = (
    0, -1, 1, 2, 7, 1e9, 10**9, 10**30, 2**63, 100_000, 4096, 0.5, 1e-30, "", "x", "../..", None, True, [],
    [0], [10**6, 10**6], {}, {"a": 1}, [[[[1]]]], "NaN", "1000000", float("nan"), float("inf"),
)  # fmt: skip


def other_value(content, draw):
    """Change one JSON value at any depth."""
    root = json.loads(content)
    places = []

    def visit(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                visit(node[key])

    visit(root)
    node, key = draw.choice(places)
    if draw.random() < 0.15:
        del node[key]
    else:
        node[key] = draw.choice(VALUES)
    return json.dumps(root).encode()


def other_size(content, draw):
    """Set a size in the JSON that the files do not match."""
    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size",
        "patch_size", "num_labels", "num_channels", "size", "crop_size", "model_args", "depths",
    )  # fmt: skip
    size = draw.choice((10**5, 2 * 10**5, 10**6, 10**9, 10**12, 50_000, 3000))
    value = draw.choice((size, [size] * 4, {"height": size, "width": size}, {"img_size": size}))
    return json.dumps(json.loads(content) | {draw.choice(names): value}).encode()


JSON_MUTATIONS = (other_value, other_value, other_size, flip_bytes, cut, repeat)
WEIGHT_MUTATIONS = (in_header, in_header, flip_bytes, cut, repeat)


class Hang(BaseException):
    """An exception that no code catches."""


def stop(*_):
    raise Hang


@contextlib.contextmanager
def at_most(seconds):
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def use(folder, image, turn):
    """Load a model as predict or finetune does, up to the first step."""
    if turn % 3:
        config = PredictConfig(model_name_or_path=str(folder), use_cpu=True)
        (record,) = predict_files(config, [str(image)])
        assert 0 <= record["score"] <= 1 and isinstance(record["label"], str)
    else:
        build_model(ModelConfig(model_name_or_path=str(folder)), LABELS)


def test_a_damaged_model_is_a_one_line_error(record_result, tiny_vit, tmp_path):
    import timm

    image = tmp_path / "image.png"
    Image.new("RGB", (16, 16), (200, 30, 90)).save(image)
    timm_folder = tmp_path / "timm"
    save_for_hf(timm.create_model("test_vit", num_classes=3), timm_folder, safe_serialization=True)
    for turn in range(3):
        use(tiny_vit, image, turn)
        use(timm_folder, image, turn)
    before, draw, good, outcomes = peak_mb(), random.Random(0), 0, {"refused": 0, "taken": 0}
    folder = tmp_path / "damaged"
    for turn in range(1000):
        source = timm_folder if turn % 5 == 4 else tiny_vit
        victim = draw.choice(
            sorted(p for p in source.iterdir() if p.suffix in (".json", ".safetensors"))
        )
        mutate = draw.choice(JSON_MUTATIONS if victim.suffix == ".json" else WEIGHT_MUTATIONS)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        (folder / victim.name).write_bytes(mutate(victim.read_bytes(), draw))
        try:
            with at_most(30):
                use(folder, image, turn)
            outcomes["taken"] += 1
            good += 1
        except UserError as error:
            outcomes["refused"] += 1
            good += one_line(error)
        except BaseException as error:  # the fault this test looks for
            print(f"{turn} {victim.name} {mutate.__name__}: {type(error).__name__}: {error}"[:300])
    grown = peak_mb() - before
    print(outcomes, f"peak memory grew by {grown:.0f} MB")
    requirement = "one line or a working model; no crash, no hang, at most 200 MB of extra memory"
    record_result(19, "mutated model files", requirement, good if grown < 200 else 0, 1000)


# Row 21

CODE = """
from pathlib import Path
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
Path({marker!r}).touch()
class StrangeConfig(PreTrainedConfig):
    model_type = "strange"
class StrangeModel(PreTrainedModel):
    config_class = StrangeConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    def __init__(self, config):
        super().__init__(config)
        self.backbone = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, config.num_labels)
        self.post_init()
    def forward(self, pixel_values, labels=None):
        return ImageClassifierOutputWithNoAttention(
            logits=self.head(self.backbone(pixel_values).mean((2, 3)))
        )
"""
AUTO_MAP = {
    "AutoConfig": "strange.StrangeConfig",
    "AutoModelForImageClassification": "strange.StrangeModel",
}


def strange_model(folder, tiny_vit, marker, **changes):
    """Save a model with custom code, as it would be published."""
    folder.mkdir()
    shutil.copy(tiny_vit / "preprocessor_config.json", folder)
    config = {
        "model_type": "strange",
        "auto_map": AUTO_MAP,
        "id2label": {"0": "across", "1": "down"},
    }
    write(folder, "config.json", config | changes)
    (folder / "strange.py").write_text(CODE.format(marker=str(marker)))
    weights = {
        "backbone.weight": torch.randn(4, 3, 3, 3), "backbone.bias": torch.zeros(4),
        "head.weight": torch.randn(2, 4), "head.bias": torch.zeros(2),
    }  # fmt: skip
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def elsewhere(name):
    return {key: f"{name}--{value}" for key, value in AUTO_MAP.items()}


# In a new process, because the Hub's address and the folder of fetched code are read at start-up.
LOADS = """
import json, os, sys
from pathlib import Path
from hub_server import Hub
cases, strange, far, marker = json.loads(sys.argv[1]), *map(Path, sys.argv[2:])
hub, results = Hub(), []
os.environ["HF_ENDPOINT"] = hub.endpoint
from hf_cifar.errors import UserError
from hf_cifar.models.build import build_model, load_classifier
from hf_cifar.config.model import ModelConfig
with hub:
    hub.fill("models", "them/strange", strange)
    hub.fill("models", "them/far", far)
    shas = {repo_id.split("/")[1]: repo.sha for (_, repo_id), repo in hub.repos.items()}
    for name, revision, trust, _ in cases:
        revision = revision and revision.format(**shas)
        options = {"model_name_or_path": name, "model_revision": revision, "trust_remote_code": trust}
        for load in (
            lambda: load_classifier(name, revision=revision, trust_remote_code=trust),
            lambda: build_model(ModelConfig(**options), {0: "a", 1: "b", 2: "c"}),
        ):
            try:
                load()
                message = None
            except UserError as error:
                message = str(error)
            results.append([message, marker.exists()])
            marker.unlink(missing_ok=True)
print(json.dumps(results))
"""
FLAG, COMMIT, FAR = (
    "--trust_remote_code",
    "40-digit commit hash as",
    "the code is in another repository",
)


def test_custom_code_runs_only_if_allowed(record_result, tiny_vit, tmp_path):
    marker = tmp_path / "ran"
    strange = strange_model(tmp_path / "strange", tiny_vit, marker)
    far = strange_model(tmp_path / "far", tiny_vit, marker, auto_map=elsewhere("them/strange"))
    kernel, processor = tmp_path / "kernel", tmp_path / "processor"
    for folder in (kernel, processor):
        shutil.copytree(tiny_vit, folder)
    config = json.loads((kernel / "config.json").read_text())
    write(kernel, "config.json", config | {"attn_implementation": "them/kernel"})
    shutil.copy(strange / "strange.py", processor)
    config = {"auto_map": {"AutoImageProcessor": "strange.StrangeModel"}}
    write(processor, "preprocessor_config.json", config | {"image_processor_type": "Strange"})
    cases = [  # name, revision, flag, text of the error; None where the code may run
        (str(strange), None, False, FLAG), (str(far), None, False, FLAG), (str(far), None, True, FAR),
        (str(kernel), None, False, FLAG), (str(processor), None, False, FLAG),
        ("them/strange", None, False, FLAG), ("them/strange", "main", False, FLAG),
        ("them/strange", "{strange}", False, FLAG), ("them/strange", None, True, COMMIT),
        ("them/strange", "main", True, COMMIT), ("them/strange", "{strange:.12}", True, COMMIT),
        ("them/far", None, False, FLAG), ("them/far", "{far}", True, FAR),
        ("them/strange", "{strange}", True, None), (str(strange), None, True, None),
    ]  # fmt: skip
    environment = hub_environment(tmp_path / "home", "set below")
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", LOADS, json.dumps(cases), str(strange), str(far), str(marker)],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    good, results = 0, json.loads(done.stdout.splitlines()[-1])
    for i, (message, ran) in enumerate(results):
        wanted = cases[i // 2][3]
        right = (
            message is None
            if wanted is None
            else not ran and wanted in (message or "") and one_line(message)
        )
        good += right
        if not right:
            print(cases[i // 2], message, ran)
    assert any(ran for _, ran in results)  # the code does run
    requirement = (
        "runs with the flag and, from the Hub, a full commit; otherwise one line says what to pass"
    )
    record_result(21, "models with custom code", requirement, good, len(results))
