"""Shared fixtures: no network, few threads, tiny real models and data."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image


def pytest_collection_modifyitems(items):
    """Start the files with slow tests first, so that no process is still at one when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, len(item.path.parents)))


@pytest.fixture(scope="session", autouse=True)
def own_disk_cache(tmp_path_factory):
    """Keep the disk cache inside the tests' own folder."""
    os.environ["HF_CIFAR_CACHE"] = str(tmp_path_factory.mktemp("disk_cache"))


@pytest.fixture(params=[1, 2, 5])
def num_threads(request):
    """Each of some numbers of threads that torch uses."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def pixel_cache(tmp_path, monkeypatch):
    """The folder of an empty disk cache of the test's own."""
    monkeypatch.setenv("HF_CIFAR_CACHE", str(tmp_path / "pixels"))
    return tmp_path / "pixels"


@pytest.fixture(scope="session", autouse=True)
def streams_end_at_once():
    """Do not let `datasets` sleep at the end of each stream, for downloads that no test starts."""
    import datasets

    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0


# The camera is a moving test picture, and its use is allowed.
BROWSER_FLAGS = [
    "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip


@pytest.fixture(scope="session")
def stripes(tmp_path_factory):
    """An image folder that can be learned in seconds: 16 x 16 px, horizontal or vertical stripes."""
    root = tmp_path_factory.mktemp("stripes")
    generator = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 11)):
        for name in ("across", "down"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 60, (16, 16, 3))
                phase = generator.integers(0, 4)
                lines = (np.arange(16) + phase) // 2 % 2 == 0
                pixels[lines] += 180
                if name == "down":
                    pixels = pixels.transpose(1, 0, 2)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def shards(stripes, tmp_path_factory):
    """The stripes in Hub layout: train in four Parquet files, and a README that counts the rows."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    root = tmp_path_factory.mktemp("shards")
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["across", "down"])})
    for split, files in (("train", 4), ("test", 1)):
        # The classes alternate, as in shuffled files.
        images = sorted((stripes / split).rglob("*.png"), key=lambda path: path.name)
        for part in range(files):
            chosen = images[part * len(images) // files : (part + 1) * len(images) // files]
            cells = [{"bytes": path.read_bytes(), "path": path.name} for path in chosen]
            labels = [features["label"].names.index(path.parent.name) for path in chosen]
            target = root / "data" / f"{split}-{part:05}-of-{files:05}.parquet"
            target.parent.mkdir(exist_ok=True)
            rows = Dataset.from_dict({"img": cells, "label": labels}, features=features)
            rows.to_parquet(str(target))
    (root / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: train, path: data/train-*}\n  - {split: test, path: data/test-*}\n"
        "dataset_info:\n  config_name: default\n  features:\n  - {name: img, dtype: image}\n"
        "  - name: label\n    dtype:\n      class_label:\n        names: {'0': across, '1': down}\n"
        "  splits:\n  - {name: train, num_bytes: 20000, num_examples: 80}\n"
        "  - {name: test, num_bytes: 5000, num_examples: 22}\n---\n"
    )
    return root


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """An image folder of 16 x 16 px in all colours, of two classes."""
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for i in range(48):
        folder = root / ("one", "two")[i % 2]
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def lights(tmp_path_factory):
    """A multi-label data set that can be learned in seconds, saved to disk: 16 x 16 px, with red, green and
    blue light on or off independently."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List
    from datasets import Image as ImageFeature

    generator = np.random.default_rng(0)
    features = Features({"photo": ImageFeature(), "lights": List(ClassLabel(names=list("rgb")))})
    splits = {}
    for split, count in (("train", 80), ("test", 24)):
        on = generator.random((count, 3)) < (0.6, 0.4, 0.3)
        pixels = generator.integers(0, 60, (count, 16, 16, 3)) + 180 * on[:, None, None, :]
        photos = [Image.fromarray(image.astype(np.uint8)) for image in pixels]
        lists = [np.flatnonzero(row).tolist() for row in on]
        splits[split] = Dataset.from_dict({"photo": photos, "lights": lists}, features=features)
    folder = tmp_path_factory.mktemp("lights")
    DatasetDict(splits).save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="session")
def save_vit(tmp_path_factory):
    """Return a function that saves a ViT with transformers and returns its folder; options: of its config."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    def save(image_size=16, **options):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("vit")
        config = ViTConfig(
            **{
                "image_size": image_size, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 3, **options,
            }
        )  # fmt: skip
        ViTForImageClassification(config).save_pretrained(folder)
        processor = ViTImageProcessor(size={"height": image_size, "width": image_size})
        processor.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_vit(save_vit):
    """A ViT of two layers for 16 x 16 px images with three classes."""
    return save_vit()


@pytest.fixture(scope="session")
def finished_vit(tmp_path_factory, stripes, tiny_vit):
    """The folder of a finished run of the tiny ViT on the stripes; copy it to change it."""
    from tiny import tiny_run

    folder = tmp_path_factory.mktemp("finished") / "run"
    tiny_run(folder, stripes, tiny_vit)
    return folder


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """A cache of `datasets` inside the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture(scope="session")
def photo():
    """A function (height, width, seed) -> Pillow image that is as smooth as most photographs."""

    def paint(height, width, seed=0):
        generator = np.random.default_rng(seed)
        y, x = np.mgrid[0:height, 0:width] / max(height, width)
        channels = []
        for _ in range(3):
            waves = sum(
                np.sin(2 * np.pi * (fy * y + fx * x) + phase)
                for fy, fx, phase in generator.uniform(-2, 2, (4, 3))
            )
            channels.append(128 + 100 * waves / np.abs(waves).max())
        return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))

    return paint


@pytest.fixture(scope="session")
def make_rows():
    """A function (labels, feature, image column, label column) -> Dataset of noise images."""

    import datasets
    from datasets import ClassLabel, Dataset, Features

    def make(labels, feature=None, image="img", label="label", sizes=((8, 8),)):
        generator = np.random.default_rng(len(labels))
        feature = feature or ClassLabel(names=["cat", "dog"])
        pictures = [
            Image.fromarray(generator.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8))
            for i in range(len(labels))
        ]
        features = Features({image: datasets.Image(), label: feature})
        return Dataset.from_dict({image: pictures, label: labels}, features=features)

    return make


@pytest.fixture
def save(tmp_path):
    """A function (**splits) -> folder written by `save_to_disk`."""
    from datasets import DatasetDict

    def write(**splits):
        folder = Path(tmp_path, f"saved{len(list(tmp_path.iterdir()))}")
        DatasetDict(splits).save_to_disk(str(folder))
        return folder

    return write


@pytest.fixture
def draw():
    """A function (kind) that draws logits and labels."""

    def draw_logits(kind, count=300, num_labels=8):
        """Logits [N, K] and labels [N]: plain, with ties, or with images or predictions missing."""
        generator = np.random.default_rng(len(kind))
        labels = generator.integers(0, num_labels, count)
        logits = generator.normal(size=(count, num_labels)) + 1.5 * np.eye(num_labels)[labels]
        if kind == "ties":
            logits = np.round(logits)
        if kind == "missing":
            labels[labels == 2] = 3  # no image
            logits[:, 5] = -9.0  # no prediction
            labels[labels == 6], logits[:, 6] = 0, -9.0  # neither
        return logits, labels

    return draw_logits


@pytest.fixture(scope="session")
def browser():
    """A Chromium, for the pages."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    with playwright.sync_playwright() as api:
        path = next(filter(None, [os.environ.get("CHROMIUM"), *found]), None)
        if path is None and not Path(api.chromium.executable_path).exists():
            pytest.skip("no Chromium; install it, or run: playwright install chromium")
        chromium = api.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        yield chromium
        chromium.close()
