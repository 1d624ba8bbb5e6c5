"""finetune_classifier with objects in place of names, and options in place of configurations."""

import json
import re

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, pipeline

from hf_cifar import (
    DataConfig,
    EvaluateConfig,
    PredictConfig,
    RunConfig,
    UserError,
    build_report,
    evaluate_saved,
    finetune_classifier,
    load_classifier,
    predict_files,
    write_report,
)
from hf_cifar.cli import main
from hf_cifar.config.objects import named

OPTIONS = {
    "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 8, "learning_rate": 5e-3,
    "num_train_epochs": 2, "precision": "fp32",
}  # fmt: skip


@pytest.fixture(scope="module")
def arrays(stripes):
    """Pixels [80, 16, 16, 3] and names of the striped training images."""
    paths = sorted((stripes / "train").rglob("*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths]), [
        p.parent.name for p in paths
    ]


@pytest.fixture
def data(arrays):
    pixels, names = arrays
    pictures = [Image.fromarray(each) for each in pixels]
    return Dataset.from_dict({"image": pictures, "label": names}).class_encode_column("label")


def test_a_name_and_a_data_set_need_no_configuration(data, tiny_vit, tmp_path):
    result = finetune_classifier(str(tiny_vit), data, output_dir=tmp_path / "run", **OPTIONS)
    assert result.metrics["validation"]["num_images"] == 8
    name = RunConfig.load(tmp_path / "run/config.yaml").data.dataset_name
    assert re.fullmatch("memory/Dataset-[0-9a-f]{16}", name)
    assert json.loads((tmp_path / "run/run.json").read_text())["dataset"]["name"] == name
    card = (tmp_path / "run/README.md").read_text()
    assert f"`{name}`: an object in memory, identified by the fingerprint" in card
    assert pipeline("image-classification", model=str(tmp_path / "run"))(data[0]["image"])


def test_objects_equal_the_same_pixels_by_name(data, arrays, stripes, tiny_vit, tmp_path):
    model = AutoModelForImageClassification.from_pretrained(tiny_vit)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    by_object = finetune_classifier(model, arrays, output_dir=tmp_path / "a", **OPTIONS)
    by_name = finetune_classifier(str(tiny_vit), data, output_dir=tmp_path / "b", **OPTIONS)
    first, second = (load_file(r.output_dir / "model.safetensors") for r in (by_object, by_name))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_with_objects_is_resumed_with_them(data, tiny_vit, tmp_path):
    options = OPTIONS | {"output_dir": tmp_path / "run", "save_steps": 5}
    model = AutoModelForImageClassification.from_pretrained(tiny_vit)
    finetune_classifier(model, data, **options)
    model.classifier.bias.data += 1  # its weights come from the checkpoint
    resumed = options | {"num_train_epochs": 3, "resume_from_checkpoint": "last"}
    assert finetune_classifier(model, data, **resumed).output_dir == tmp_path / "run"
    assert json.loads((tmp_path / "run/run.json").read_text())["epochs"] == 3
    with pytest.raises(
        UserError, match=r"--dataset_name is memory/Dataset-.* started with memory/"
    ):
        finetune_classifier(model, data.select(range(60)), **resumed)


def test_what_a_file_cannot_repeat_is_said_in_one_line(data, tiny_vit, tmp_path, capsys):
    run = tmp_path / "run"
    model = AutoModelForImageClassification.from_pretrained(tiny_vit)
    finetune_classifier(model, data, output_dir=run, **OPTIONS)
    words = "was a Python object, which cannot be loaded from a file; pass the same object"
    for command in (
        ["reproduce", str(run)],
        ["evaluate", "--model_name_or_path", str(run)],
        ["finetune", "--config", str(run / "config.yaml"), "--output_dir", str(tmp_path / "new")],
        ["finetune", "--config", str(run / "config.yaml"), "--resume_from_checkpoint", "last"],
    ):
        assert main(command) == 2
        assert words in capsys.readouterr().err.splitlines()[-1], command
    config = EvaluateConfig(
        model_name_or_path=str(run), output_dir=str(tmp_path / "again"), use_cpu=True
    )
    again = evaluate_saved(config, DataConfig(dataset_name=data))
    assert again.metrics["num_images"] == 8


def test_a_model_in_memory_is_evaluated_and_predicts(data, stripes, tiny_vit, tmp_path):
    splits = {
        "train": data.select(range(5, 75)),
        "validation": data.select([*range(5), *range(75, 80)]),
    }
    result = finetune_classifier(tiny_vit, splits, output_dir=tmp_path / "run", **OPTIONS)
    model = (result.model, result.image_processor)
    config = EvaluateConfig(model_name_or_path=model, use_cpu=True)
    again = evaluate_saved(config, DataConfig(dataset_name=splits))
    assert again.metrics["accuracy"] == result.metrics["validation"]["accuracy"]
    image = str(next((stripes / "test").rglob("*.png")))
    by_object, by_name = (
        next(predict_files(PredictConfig(model_name_or_path=each, use_cpu=True), [image]))
        for each in (model, str(tmp_path / "run"))
    )
    assert by_object == by_name
    with pytest.raises(UserError, match="a Linear alone has no labels or no image processor"):
        load_classifier(named(torch.nn.Linear(2, 2)))


def test_a_module_is_saved_as_weights(arrays, tmp_path, caplog):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        torch.nn.Linear(8, 2),
    )  # fmt: skip
    before = [p.clone() for p in net.parameters()]
    result = finetune_classifier(net, arrays, output_dir=tmp_path / "run", image_size=16, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    card = (tmp_path / "run/README.md").read_text()
    assert "The network is a `torch.nn.modules.container.Sequential`, which has no config" in card
    assert "pipeline(" not in card and "library_name: pytorch" in card
    net.load_state_dict(load_file(tmp_path / "run/model.safetensors"))
    pixels = torch.rand(4, 3, 16, 16)
    with torch.inference_mode():
        assert torch.allclose(net(pixels), result.model.eval()(pixel_values=pixels).logits)
    with pytest.raises(
        UserError, match=r"a torch\.nn\.Module without a config; create it in Python"
    ):
        evaluate_saved(
            EvaluateConfig(model_name_or_path=str(tmp_path / "run")),
            DataConfig(dataset_name=arrays),
        )


def test_a_report_of_an_object_has_its_pictures(data, tiny_vit, tmp_path, caplog):
    run = tmp_path / "run"
    finetune_classifier(tiny_vit, data, output_dir=run, **OPTIONS)
    assert build_report(run).pictures == {}
    assert "was a Python object" in caplog.text
    report = build_report(run, dataset=data)
    shown = report.facts["worst_errors"] + report.facts["least_confident_hits"]
    assert shown
    for row in shown:
        picture = np.asarray(data[row["row_id"]]["image"])
        assert np.array_equal(report.pictures[row["picture"]], picture)
    assert "data:image/png;base64," in write_report(run, dataset=data).read_text()
    with pytest.raises(UserError, match=r"was made with memory/Dataset-.*; pass the same object"):
        build_report(run, dataset=data.select(range(70)))


def test_unknown_options_get_a_hint(data):
    with pytest.raises(UserError, match="--lr: pass --learning_rate"):
        finetune_classifier("scratch/test_resnet", data, lr=1e-3)
