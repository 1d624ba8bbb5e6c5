"""hf_cifar.deploy.export: files that agree with the model, and appear complete or not at all."""

import json
import logging
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from tiny import tiny_run

from hf_cifar import PredictConfig, load_classifier, predict_files
from hf_cifar.cli import main
from hf_cifar.config.deployment import ExportConfig
from hf_cifar.deploy import export as export_module
from hf_cifar.deploy.export import export_run
from hf_cifar.deploy.formats import open_onnx
from hf_cifar.deploy.model_repository import server_config
from hf_cifar.deploy.parity import BATCH_SIZES, TOLERANCE, compare, parity_images, verdict
from hf_cifar.errors import UserError
from hf_cifar.preprocessor import Preprocessor
from hf_cifar.runs.folder import RunFolder


@pytest.fixture(scope="module")
def run(stripes, tiny_vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny_run(folder / "vit", stripes, tiny_vit, "--probe_images", "0")
    return folder / "vit"


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    """The run as ONNX, written by the command."""
    output = tmp_path_factory.mktemp("onnx") / "new" / "vit.onnx"
    assert main(["export", str(run), "--output", str(output)]) == 0
    return output


def notes_of(path):
    properties = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    return json.loads(properties["hf_cifar"])


def test_the_file_agrees_with_the_model(file, run):
    report = json.loads(file.with_name("vit.onnx.parity.json").read_text())
    count = report["num_images"]
    assert count == RunFolder(run).facts()["num_validation"]
    assert list(report["batches"]) == [str(size) for size in BATCH_SIZES]
    assert all(batch["same_top1"] == count for batch in report["batches"].values())
    assert verdict(report)[1]
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "vit.onnx",
        "vit.onnx.parity.json",
    ]


def test_the_file_says_what_it_is(file, run, stripes):
    notes = notes_of(file)
    assert notes["labels"] == ["across", "down"]
    assert (notes["input"], notes["input_size"], notes["thresholds"]) == (
        "pixel_values",
        [16, 16],
        None,
    )
    assert Preprocessor.from_dict(notes["preprocessor"]) == Preprocessor.of(
        *load_classifier(str(run))
    )
    facts = RunFolder(run).facts()
    assert notes["run"]["split_hash"] == facts["split_hash"]
    assert notes["run"]["dataset"] == stripes.name
    assert re.fullmatch("[0-9a-f]{64}", notes["run"]["weights_sha256"])
    assert str(run.parent) not in json.dumps(notes)
    model = onnx.load(file)
    (batch, *rest) = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert [dim.dim_value for dim in rest] == [3, 16, 16]
    assert [output.name for output in model.graph.output] == ["logits", "probabilities"]


def test_probabilities_are_those_of_the_calibrated_model(file, run):
    model, _ = load_classifier(str(run))
    pixel_values = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    logits, probabilities = open_onnx(file)(pixel_values.numpy())
    with torch.inference_mode():
        expected = model(pixel_values=pixel_values).logits
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    np.testing.assert_allclose(probabilities, expected.softmax(dim=1), atol=1e-5)


def test_multi_label_files_have_independent_probabilities_and_thresholds(lights, tmp_path):
    tiny_run(
        tmp_path / "run",
        lights,
        "scratch/test_vit",
        "--image_size",
        "32",
        "--learning_rate",
        "1e-3",
    )
    output = tmp_path / "lights.onnx"
    report = export_run(tmp_path / "run", ExportConfig(output=str(output)))
    assert verdict(report)[1]
    notes, config = notes_of(output), load_classifier(str(tmp_path / "run")).model.config
    assert notes["thresholds"] == config.thresholds
    logits, probabilities = open_onnx(output)(np.zeros((2, 3, 32, 32), np.float32))
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)


@pytest.mark.parametrize("form", ["torch_export", "openvino"])
def test_other_formats_agree_and_say_what_they_are(form, run, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_cifar")
    output = tmp_path / {"torch_export": "vit.pt2", "openvino": "vit.xml"}[form]
    assert verdict(export_run(run, ExportConfig(format=form, output=str(output))))[1]
    assert "agrees with the model: the same top-1 on" in caplog.text
    written = {path.name for path in tmp_path.iterdir()}
    extra = {"vit.bin"} if form == "openvino" else set()
    assert written == {output.name, f"{output.name}.parity.json", *extra}
    if form == "torch_export":
        notes = {"hf_cifar.json": ""}
        torch.export.load(output, extra_files=notes)
        assert json.loads(notes["hf_cifar.json"])["labels"] == ["across", "down"]
    else:
        import openvino

        notes = openvino.Core().read_model(output).get_rt_info("hf_cifar").astype(str)
        assert json.loads(notes)["labels"] == ["across", "down"]


def test_images_of_any_size_go_in_with_preprocessing(run, photo, tmp_path):
    """And --dataset_name takes a folder of them; unreadable ones are counted."""
    images = tmp_path / "images"
    images.mkdir()
    for number, size in enumerate([(20, 30), (20, 30), (100, 41), (16, 16), (7, 90)]):
        photo(*size, seed=number).save(images / f"{number}.png")
    (images / "broken.jpg").write_bytes((images / "0.png").read_bytes()[:60])
    output = tmp_path / "uint8.onnx"
    config = ExportConfig(
        output=str(output), with_preprocessing=True, dataset_name=str(images), parity_images=100
    )
    report = export_run(run, config)
    assert (report["num_images"], report["num_unreadable"]) == (5, 1)
    assert report["source"] == "images of images"
    assert verdict(report)[1]
    dims = onnx.load(output).graph.input[0].type.tensor_type.shape.dim
    assert [bool(dim.dim_param) for dim in dims] == [True, True, True, False]
    assert dims[3].dim_value == 3


def test_a_model_that_does_not_agree_is_reported(run):
    model, processor = load_classifier(str(run))
    preprocessor = Preprocessor.of(model, processor)
    given = parity_images(run, None, 10, preprocessor)

    def wrong(pixel_values):
        with torch.inference_mode():
            logits = model(pixel_values=torch.from_numpy(pixel_values)).logits.flip(1).numpy()
        return logits, np.full_like(logits, 0.5)

    report = compare(wrong, model, preprocessor, given, takes_images=False)
    text, agrees = verdict(report)
    assert not agrees
    assert re.match(r"does not agree with the model: the same top-1 on 0 of \d+ images", text)

    def broken(pixel_values):
        return [np.full((len(pixel_values), 2), np.nan, np.float32)] * 2

    _, agrees = verdict(compare(broken, model, preprocessor, given, takes_images=False))
    assert not agrees


def test_a_model_that_no_exporter_takes_is_one_line(run, tmp_path, monkeypatch):
    def branching(self, images):
        logits = self.model(pixel_values=images).logits
        return (logits, logits) if logits.sum() > 0 else (-logits, logits)

    monkeypatch.setattr("hf_cifar.deploy.graph.ClassifierGraph.forward", branching)
    output = str(tmp_path / "vit.pt2")
    config = ExportConfig(format="torch_export", output=output, parity_images=0)
    with pytest.raises(UserError, match=r"cannot be exported as torch_export \(.*\); pass another"):
        export_run(run, config)
    assert not list(tmp_path.iterdir())


# The part of Triton's model_config.proto that a model needs, with its field numbers.
# Source: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto
FIELDS = {
    "ModelConfig": [
        ("name", 1, "string"), ("platform", 2, "string"), ("max_batch_size", 4, "int32"),
        ("input", 5, "*ModelInput"), ("output", 6, "*ModelOutput"),
        ("dynamic_batching", 11, "ModelDynamicBatching"),
    ],
    "ModelInput": [("name", 1, "string"), ("data_type", 2, "DataType"), ("dims", 4, "*int64")],
    "ModelOutput": [
        ("name", 1, "string"), ("data_type", 2, "DataType"), ("dims", 3, "*int64"),
        ("label_filename", 4, "string"),
    ],
    "ModelDynamicBatching": [],
}  # fmt: skip
TYPES = {"TYPE_UINT8": 2, "TYPE_FP32": 11}


def model_config(text):
    """Parse config.pbtxt as a server does; fails for unknown fields and values."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", syntax="proto3")
    file.enum_type.add(name="DataType").value.add(name="TYPE_INVALID", number=0)
    for name, number in TYPES.items():
        file.enum_type[0].value.add(name=name, number=number)
    for message, fields in FIELDS.items():
        found = file.message_type.add(name=message)
        for name, number, kind in fields:
            scalar = kind.strip("*")
            field = found.field.add(name=name, number=number, label=3 if kind[0] == "*" else 1)
            if scalar in ("string", "int32", "int64"):
                field.type = {"string": 9, "int32": 5, "int64": 3}[scalar]
            else:
                field.type, field.type_name = (14 if scalar == "DataType" else 11), f".{scalar}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("ModelConfig"))
    return text_format.Parse(text, kind())


def test_a_server_loads_the_folder(run, tmp_path):
    folder = tmp_path / "stripes"
    config = ExportConfig(format="server", output=str(folder))
    export_run(run, config)
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {"1/model.onnx", "config.pbtxt", "labels.txt", "parity.json"}
    found = model_config((folder / "config.pbtxt").read_text())
    assert (found.name, found.platform) == ("stripes", "onnxruntime_onnx")
    assert found.HasField("dynamic_batching")
    assert (folder / "labels.txt").read_text() == "across\ndown\n"
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
    assert [(each.name, list(each.dims)) for each in found.input] == [
        (given.name, given.shape[1:]) for given in session.get_inputs()
    ]
    assert [(each.name, list(each.dims)) for each in found.output] == [
        (made.name, made.shape[1:]) for made in session.get_outputs()
    ]
    assert {each.data_type for each in (*found.input, *found.output)} == {TYPES["TYPE_FP32"]}
    with pytest.raises(UserError, match="exists; pass another --output, or --overwrite"):
        export_run(run, config)


def test_the_configuration_of_a_server_with_images_of_any_size():
    found = model_config(server_config('a "b"', 3, None))
    assert found.name == 'a "b"'
    assert (found.input[0].data_type, list(found.input[0].dims)) == (
        TYPES["TYPE_UINT8"],
        [-1, -1, 3],
    )
    assert found.output[1].label_filename == "labels.txt"


def test_an_existing_file_is_replaced_only_on_request(file, run, tmp_path, capsys):
    output = tmp_path / "vit.onnx"
    output.write_text("mine")
    arguments = ["export", str(run), "--output", str(output), "--parity_images", "0"]
    assert main(arguments) == 2
    assert "exists; pass another --output, or --overwrite to replace it" in capsys.readouterr().err
    assert output.read_text() == "mine"
    stale = tmp_path / "vit.onnx.parity.json"
    stale.write_text("{}")
    assert main([*arguments, "--overwrite"]) == 0
    assert "--parity_images 0: not compared with the model" in capsys.readouterr().err
    assert output.read_bytes() == file.read_bytes()
    assert not stale.exists()


def test_nothing_is_left_of_an_export_that_fails(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "compare", fail)
    with pytest.raises(KeyboardInterrupt):
        export_run(run, ExportConfig(output=str(tmp_path / "vit.onnx")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--output is missing"),
        (["--output", "vit"], r"--format onnx writes a file that ends with \.onnx"),
        (["--output", "vit.onnx", "--format", "server"], "writes a folder, without an ending"),
        (
            ["--output", "vit.xml", "--format", "openvino", "--with_preprocessing"],
            "OpenVINO computes as float32",
        ),
        (
            ["--output", "vit.onnx", "--parity_images", "0", "--dataset_name", "x"],
            "--dataset_name has no effect with --parity_images 0",
        ),
        (["--output", "vit.onnx", "--dataset_name", "none"], "no image files in none"),
        (["--output", ".", "--format", "server"], "has no name"),
        (["--output", "/dev/null/vit.onnx"], "is not a folder that can be written"),
    ],
)
def test_mistakes_are_found_before_the_export(flags, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_run_whose_data_are_gone_needs_other_images(run, tmp_path, stripes):
    moved = shutil.copytree(run, tmp_path / "vit")
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(stripes), str(tmp_path / "gone")))
    output = tmp_path / "vit.onnx"
    with pytest.raises(UserError, match=r"no validation images of the run .* pass --dataset_name"):
        export_run(moved, ExportConfig(output=str(output)))
    assert not output.exists()
    images = str(stripes / "test")
    assert verdict(export_run(moved, ExportConfig(output=str(output), dataset_name=images)))[1]


def test_a_missing_package_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        UserError, match=r"onnxscript is not installed; run: pip install 'hf-cifar\[deploy\]'"
    ):
        export_run(run, ExportConfig(output=str(tmp_path / "vit.onnx")))


def test_the_code_of_the_page_runs(file, run, photo, tmp_path, monkeypatch, capsys):
    shutil.copy(file, tmp_path / "lite0.onnx")
    uint8 = str(tmp_path / "lite0-uint8.onnx")
    export_run(run, ExportConfig(output=uint8, with_preprocessing=True, parity_images=0))
    photo(50, 70).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    blocks = re.findall("```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    (inside, outside) = (line.split() for line in capsys.readouterr().out.splitlines())
    assert inside[0] == outside[0]
    assert float(inside[1]) == pytest.approx(float(outside[1]), abs=1e-5)
    config = PredictConfig(model_name_or_path="lite0.onnx")
    (record,) = predict_files(config, ["photo.jpg"])
    assert record["label"] == inside[0]
