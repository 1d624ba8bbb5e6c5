"""Data and models of the frozen runs, independent of library versions; and --write-references."""

import math

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, List
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

SIDE, CLASSES = 20, ["red", "green", "blue"]


def pytest_addoption(parser):
    parser.addoption(
        "--write-references", action="store_true", help="write tests/invariants/*.json again"
    )


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "reference":
                terminalreporter.write_line(text)


def paint(lights, generator):
    """Return noise [N, SIDE, SIDE, 3], brighter in the channels whose light [N, 3] is on."""
    noise = generator.randint(0, 156, (len(lights), SIDE, SIDE, 3))
    return (noise + 40 * lights[:, None, None, :]).astype(np.uint8)


def save_images(folder):
    """Save one folder of images per class."""
    generator = np.random.RandomState(0)  # its numbers never change, those of default_rng may
    for label, name in enumerate(CLASSES):
        (folder / "train" / name).mkdir(parents=True)
        lights = np.tile(np.eye(3, dtype=int)[label], (32, 1))
        for number, pixels in enumerate(paint(lights, generator)):
            Image.fromarray(pixels).save(folder / "train" / name / f"{number:02}.png")


def save_lights(folder):
    """Save images with any number of labels each."""
    generator = np.random.RandomState(1)
    on = generator.randint(0, 2, (96, 3))
    columns = {
        "image": [Image.fromarray(pixels) for pixels in paint(on, generator)],
        "label": [np.flatnonzero(row).tolist() for row in on],
    }
    features = Features({"image": ImageFeature(), "label": List(ClassLabel(names=CLASSES))})
    DatasetDict(train=Dataset.from_dict(columns, features=features)).save_to_disk(str(folder))


def save_shards(folder):
    """Save two Parquet files in Hub layout.

    A stream is split by a hash of the encoded bytes, so the images are PPM files: no compression whose output
    depends on a version.
    """
    generator = np.random.RandomState(2)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    (folder / "data").mkdir(parents=True)
    for shard in range(2):
        labels = generator.randint(0, 3, 48)
        cells = [
            {"bytes": b"P6 %d %d 255\n" % (SIDE, SIDE) + pixels.tobytes(), "path": None}
            for pixels in paint(np.eye(3, dtype=int)[labels], generator)
        ]
        rows = Dataset.from_dict({"image": cells, "label": labels.tolist()}, features=features)
        rows.to_parquet(str(folder / "data" / f"train-{shard}-of-2.parquet"))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: data/train-*}\n"
        "dataset_info:\n  config_name: default\n  features:\n  - {name: image, dtype: image}\n"
        "  - name: label\n    dtype:\n      class_label:\n"
        "        names: {'0': red, '1': green, '2': blue}\n"
        "  splits:\n  - {name: train, num_bytes: 120000, num_examples: 96}\n---\n"
    )


def save_vit(folder):
    config = ViTConfig(
        image_size=SIDE, patch_size=5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=5, hidden_dropout_prob=0.1,
    )  # fmt: skip
    save_model(ViTForImageClassification(config), folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def save_resnet(folder):
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    save_model(ResNetForImageClassification(config), folder)
    ConvNextImageProcessor(size={"shortest_edge": SIDE}, crop_pct=1.0).save_pretrained(folder)


def save_model(model, folder):
    """Save a model with weights that do not depend on how transformers draws them."""
    generator = np.random.RandomState(3)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            values = generator.randn(*parameter.shape) / math.sqrt(parameter[0].numel())
            parameter.data = torch.tensor(values, dtype=torch.float32)
    model.save_pretrained(folder)


SAVE = {
    "images": save_images,
    "lights": save_lights,
    "shards": save_shards,
    "vit": save_vit,
    "resnet": save_resnet,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function that returns the folder of a data set or model of SAVE, and any other name unchanged."""
    root = tmp_path_factory.mktemp("saved")

    def folder_of(name):
        if name not in SAVE:
            return name
        if not (root / name).exists():
            SAVE[name](root / name)
        return str(root / name)

    return folder_of


@pytest.fixture(scope="module")
def same_everywhere():
    """Use one thread, because sums depend on the number; and do not wait 5 s for each closed stream."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
        yield
    torch.set_num_threads(num_threads)
