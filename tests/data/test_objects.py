"""hf_cifar.data.objects: data sets in memory, of every kind, as rows of images and labels."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from PIL import Image

from hf_cifar import DataConfig, UserError, load_splits, load_test_split
from hf_cifar.data import columns
from hf_cifar.data.images import decode_cell
from hf_cifar.data.sources import load_source
from hf_cifar.data.splits import prepare_splits
from hf_cifar.transforms.preprocessing import Preprocessing

VIEW = Preprocessing((12, 12), None, "bicubic", (0.5,) * 3, (0.5,) * 3)
generator = np.random.default_rng(0)
PIXELS = generator.integers(0, 256, (40, 6, 8, 3)).astype(np.uint8)
LABELS = [i % 2 for i in range(40)]
NAMES = ["cat" if i % 2 else "ant" for i in range(40)]


def pictures():
    return [Image.fromarray(each) for each in PIXELS]


class MapStyle:
    """As torchvision's data sets: pairs by number, and the names of the classes."""

    classes = ("ant", "cat")

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, i):
        return Image.fromarray(PIXELS[i]), LABELS[i]


def rows_of_pictures():
    for picture, label in zip(pictures(), LABELS, strict=True):
        yield {"image": picture, "label": label}


def files():
    """Paths of the pictures, relative to the current folder."""
    folder = Path(tempfile.mkdtemp())
    for number, picture in enumerate(pictures()):
        picture.save(folder / f"{number}.png")
    return [os.path.relpath(folder / f"{number}.png") for number in range(len(PIXELS))]


def dataset():
    return Dataset.from_dict({"image": pictures(), "label": NAMES}).class_encode_column("label")


KINDS = {
    "Dataset": dataset,
    "Dataset with a format": lambda: dataset().with_format("torch"),
    "DatasetDict": lambda: DatasetDict(train=dataset()),
    "IterableDataset": lambda: dataset().to_iterable_dataset(),
    "DataFrame": lambda: pd.DataFrame({"picture": pictures(), "kind": NAMES}),
    "names of files": lambda: pd.DataFrame({"picture": files(), "label": NAMES}),
    "names of files in columns": lambda: {"image": files(), "label": NAMES},
    "arrays": lambda: (PIXELS, np.array(LABELS)),
    "arrays, channels first": lambda: (PIXELS.transpose(0, 3, 1, 2), LABELS),
    "tensors": lambda: (torch.tensor(PIXELS).permute(0, 3, 1, 2), torch.tensor(LABELS)),
    "floats": lambda: (PIXELS.astype(np.float32) / 255, LABELS),
    "whole floats": lambda: (PIXELS.astype(np.float32), LABELS),
    "integers": lambda: (PIXELS.astype(np.int64), LABELS),
    "list of arrays": lambda: (list(PIXELS), NAMES),
    "list of pictures": lambda: (pictures(), NAMES),
    "one-hot": lambda: (PIXELS, np.eye(2)[LABELS]),
    "columns": lambda: {"x": PIXELS, "y": LABELS},
    "rows": lambda: [{"image": p, "label": n} for p, n in zip(pictures(), NAMES, strict=True)],
    "pairs": lambda: list(zip(pictures(), LABELS, strict=True)),
    "torchvision": MapStyle,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_pixels_and_labels(kind):
    splits = load_splits(DataConfig(dataset_name=KINDS[kind](), train_val_split=0.25))
    assert list(splits.id2label.values()) in (["ant", "cat"], ["0", "1"])
    assert (len(splits.train), len(splits.validation)) == (30, 10)
    for split in (splits.train, splits.validation):
        for position, row in enumerate(split.row_ids):
            assert split.labels[position] == LABELS[row]
    rows = load_source(DataConfig(dataset_name=KINDS[kind]()))["train"]
    from hf_cifar.data.images import decode_cell

    for cell, expected in zip(rows["image"], PIXELS, strict=True):
        assert np.array_equal(decode_cell(cell), expected)


def test_splits_in_a_dict_share_the_classes_of_train():
    data = {
        "test": (PIXELS[1::2], NAMES[1::2]),
        "train": (PIXELS, NAMES),
        "val": (PIXELS[:8], NAMES[:8]),
    }
    config = DataConfig(dataset_name=data)
    splits = load_splits(config)
    assert (len(splits.train), len(splits.validation), len(load_test_split(config))) == (40, 8, 20)
    assert set(load_test_split(config).labels.tolist()) == {1}


def test_grey_alpha_and_16_bit_images():
    grey = PIXELS[..., 0]
    alpha = np.concatenate([PIXELS, np.full((*grey.shape, 1), 255, np.uint8)], axis=-1)
    for images, expected in (
        (grey, np.repeat(grey[..., None], 3, -1)),
        (grey[..., None], np.repeat(grey[..., None], 3, -1)),
        (alpha, PIXELS),
        (grey.astype(np.uint16) * 257, np.repeat(grey[..., None], 3, -1)),
    ):
        rows = load_source(DataConfig(dataset_name=(images, LABELS)))["train"]
        found = np.stack([decode_cell(cell) for cell in rows["image"]])
        assert np.array_equal(found, expected)


def test_multiple_labels_per_image():
    hot = np.array([[1, i % 2, 1] for i in range(40)])
    lists = [["a", "b", "c"] if i % 2 else ["a", "c"] for i in range(40)]
    for labels in (hot, lists):
        splits = load_splits(DataConfig(dataset_name=(PIXELS, labels)))
        assert splits.multi_label and splits.train.labels.shape[1] == 3


def test_a_stream_is_streamed_on_request():
    rows = IterableDataset.from_generator(rows_of_pictures, features=dataset().features)
    config = DataConfig(
        dataset_name=rows,
        streaming=True,
        max_eval_samples=10,
        max_train_samples=20,
        train_val_split=0.5,
    )
    splits = load_splits(config)
    assert len(splits.validation) == 10 and len(list(splits.train.read(0)))


def test_a_transform_is_not_used_and_said_so(caplog):
    rows = dataset().with_transform(lambda batch: {"image": [0] * len(batch["image"])})
    splits = load_splits(DataConfig(dataset_name=rows))
    assert len(splits.train) == 36 and "the transform of the Dataset is not used" in caplog.text


def test_floats_after_a_missing_image_are_scaled_alike():
    images = [None, *PIXELS[1:].astype(np.float32)]
    rows = load_source(DataConfig(dataset_name=(images, LABELS)))["train"]
    assert np.array_equal(decode_cell(rows[1]["image"]), PIXELS[1])


def test_bfloat16():
    halves = torch.tensor((PIXELS > 99) * 1.0).permute(0, 3, 1, 2).bfloat16()
    rows = load_source(DataConfig(dataset_name=(halves, LABELS)))["train"]
    assert np.array_equal(decode_cell(rows[0]["image"]), (PIXELS[0] > 99) * 255)


@pytest.mark.parametrize("kind", ["pairs", "columns", "stream"])
def test_images_of_more_than_one_piece_keep_their_order(monkeypatch, kind):
    monkeypatch.setattr(columns, "PIECE_BYTES", 1000)
    data = {
        "pairs": (PIXELS, LABELS),
        "columns": {"image": list(PIXELS), "label": LABELS, "place": [str(i) for i in range(40)]},
        "stream": IterableDataset.from_generator(rows_of_pictures, features=dataset().features),
    }[kind]
    rows = load_source(DataConfig(dataset_name=data))["train"]
    assert np.array_equal([decode_cell(cell) for cell in rows["image"]], PIXELS)
    assert rows["label"][:] == LABELS


def test_a_missing_image_is_skipped_on_request():
    data = ([None, *PIXELS[1:]], LABELS)
    config = DataConfig(dataset_name=data, on_bad_image="skip")
    splits = prepare_splits(load_splits(config), VIEW, config)
    assert len(splits.train) + len(splits.validation) == 39


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((PIXELS, LABELS[:-1]), "40 images have 39 labels"),
        ((PIXELS.astype(np.float32) - 100, LABELS), "the images hold negative numbers"),
        ((PIXELS.astype(np.int64) - 100, LABELS), "the images hold negative numbers"),
        (([None, *(PIXELS[1:] * -1.0)], LABELS), "the images hold negative numbers"),
        ((np.where(PIXELS, np.nan, 0.5), LABELS), "the images hold floats up to nan"),
        ((PIXELS[:, :0] * 1.0, LABELS), r"an image is float64 of shape \[0, 8, 3\]"),
        ((PIXELS.astype(str), LABELS), "an image is <U3"),
        ((PIXELS.astype(np.float32) * 10, LABELS), "the images hold floats up to 2550"),
        ((PIXELS.astype(np.int32) * 10, LABELS), "int32 up to .*; pass uint8"),
        ((PIXELS.reshape(40, -1), LABELS), r"an image has the shape \[144\]"),
        (([1, 2], ["a", "b"]), "a int is not an image; pass a datasets.Dataset"),
        (torch.utils.data.DataLoader(MapStyle()), "a DataLoader is neither a data set nor a model"),
        ([], "a list is not a data set of images; pass a datasets.Dataset"),
        ({"x": PIXELS, "y": [1]}, "the columns have different lengths"),
        ((PIXELS, [None, *LABELS[1:]]), "label"),
    ],
)
def test_what_is_no_data_set_is_refused(data, words):
    with pytest.raises(UserError, match=words) as caught:
        load_splits(DataConfig(dataset_name=data))
    assert "\n" not in str(caught.value)


def test_what_is_in_memory_is_not_streamed():
    with pytest.raises(UserError, match="a tuple is in memory already; leave out streaming"):
        load_splits(DataConfig(dataset_name=(PIXELS, LABELS), streaming=True))
