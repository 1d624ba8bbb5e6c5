"""Exported files: the same answers as the run, and nothing of a hostile file is read."""

import os
import shutil

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import set_external_data
from PIL import Image
from tiny import tiny_run

from hf_cifar import load_classifier
from hf_cifar.cli import main
from hf_cifar.config.deployment import ExportConfig
from hf_cifar.deploy.export import export_run

SECRET = b"secret" * 100


@pytest.fixture(scope="module")
def finished(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("exported") / "run"
    tiny_run(folder, stripes, tiny_vit)
    return folder


@pytest.fixture(scope="module")
def exported(finished):
    file = finished.with_name("model.onnx")
    export_run(finished, ExportConfig(output=str(file), parity_images=0))
    return file


def test_export_agrees_with_the_run(finished, tmp_path, record_result):
    generator = np.random.default_rng(0)
    for number in range(1000):
        pixels = generator.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:04}.png")
    config = ExportConfig(output=str(tmp_path / "model.onnx"), dataset_name=str(tmp_path))
    batches = export_run(finished, config)["batches"]
    assert set(batches) == {"1", "2", "7", "64"} or set(batches) == {1, 2, 7, 64}
    assert max(each["logits"] for each in batches.values()) <= 1e-4
    passed = sum(each["same_top1"] for each in batches.values())
    record_result(
        12, "ONNX beside the run, in batches of 1, 2, 7 and 64", "same top-1, logits within 1e-4",
        passed, 4000,
    )  # fmt: skip


def hostile(exported, folder):
    """Yield files whose weights are elsewhere: in places outside their folder, or behind links."""
    secret = folder / "secret.bin"
    secret.write_bytes(SECRET)
    places = (
        "../secret.bin", "../../etc/passwd", str(secret), "/etc/passwd", "inside.bin", "sub/../../secret.bin",
        "link.bin", "",
    )  # fmt: skip
    for number, place in enumerate(places):
        below = folder / f"place-{number}"
        below.mkdir()
        model = onnx.load(str(exported))
        tensor = max(model.graph.initializer, key=lambda each: len(each.raw_data))
        (below / "inside.bin").write_bytes(tensor.raw_data)
        os.symlink(secret, below / "link.bin")
        set_external_data(tensor, place)
        tensor.ClearField("raw_data")
        (below / "model.onnx").write_bytes(model.SerializeToString())
        yield below / "model.onnx"
    link = folder / "link.onnx"
    os.symlink(exported, link)
    yield link
    target = folder / "folder"
    target.mkdir()
    shutil.copy(exported, target / "model.onnx")
    os.symlink("/etc/passwd", target / "passwd.onnx")
    yield target / "passwd.onnx"


def test_weights_in_other_files(exported, finished, stripes, tmp_path, capsys, record_result):
    image = str(next((stripes / "test").rglob("*.png")))
    passed, files = 0, list(hostile(exported, tmp_path))
    for file in files:
        status = main(["predict", "--model_name_or_path", str(file), image])
        lines = capsys.readouterr().err.splitlines()
        passed += status == 2 and len(lines) == 1 and "secret" * 2 not in lines[0]
    assert main(["predict", "--model_name_or_path", str(exported), image]) == 0
    assert load_classifier(str(exported)).model.config.id2label == {0: "across", 1: "down"}
    record_result(
        20, "ONNX files with weights elsewhere, and links", "refused in one line", passed, 10
    )
