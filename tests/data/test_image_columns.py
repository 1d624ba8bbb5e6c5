"""hf_cifar.data.image_columns: every kind of column that holds images, and numbers that are none."""

import io

import numpy as np
import pyarrow
import pytest
from datasets import (
    Array2D,
    Array3D,
    ClassLabel,
    Dataset,
    Features,
    LargeList,
    List,
    Value,
    concatenate_datasets,
)
from datasets import Image as ImageFeature
from datasets.table import InMemoryTable
from pictures import encode
from PIL import Image

from hf_cifar.config.data import DataConfig
from hf_cifar.data.image_columns import encoded_images
from hf_cifar.data.images import decode_cell
from hf_cifar.data.sources import load_source
from hf_cifar.data.splits import load_splits, prepare_splits
from hf_cifar.errors import UserError
from hf_cifar.transforms.preprocessing import Preprocessing

VIEW = Preprocessing((12, 12), None, "bicubic", (0.5,) * 3, (0.5,) * 3)

GENERATOR = np.random.default_rng(0)
COLOUR = GENERATOR.integers(0, 256, (4, 8, 6, 3), dtype=np.uint8)
GREY = GENERATOR.integers(0, 256, (4, 8, 6), dtype=np.uint8)
SQUARE = GENERATOR.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)


def make(cells, feature, column="picture"):
    features = Features({column: feature, "label": Value("string")})
    labels = ["ab"[i % 2] for i in range(len(cells))]
    return Dataset.from_dict({column: list(cells), "label": labels}, features=features)


def read(folder, **options):
    return load_source(DataConfig(dataset_name=str(folder), **options))


def decoded(rows):
    assert rows.features["image"] == ImageFeature(decode=False)
    return [decode_cell(cell) for cell in rows["image"]]


def nested(kind, depth, dtype):
    feature = Value(dtype)
    for _ in range(depth):
        feature = kind(feature)
    return feature


def rgb(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=-1)


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_bytes(save, kind):
    files = [encode(Image.fromarray(image)) for image in COLOUR]
    loaded = read(save(train=make(files, Value(kind)), test=make(files[:1], Value(kind))))
    np.testing.assert_array_equal(decoded(loaded["train"]), COLOUR)
    np.testing.assert_array_equal(decoded(loaded["test"]), COLOUR[:1])


@pytest.mark.parametrize("path", [True, False])
def test_structs_of_bytes_and_path(save, path):
    more = {"path": "a.png"} if path else {}
    cells = [{"bytes": encode(Image.fromarray(image)), **more} for image in COLOUR]
    feature = {"bytes": Value("binary"), **({"path": Value("string")} if path else {})}
    loaded = read(save(train=make(cells, feature)))
    np.testing.assert_array_equal(decoded(loaded["train"]), COLOUR)


def test_structs_of_more_than_two_gigabytes(tmp_path):
    content = pyarrow.py_buffer(bytes(2**30))
    ends = pyarrow.py_buffer(np.array([0, 2**30], np.int32))
    cell = pyarrow.Array.from_buffers(pyarrow.binary(), 1, [None, ends, content])
    cells = pyarrow.StructArray.from_arrays([cell, pyarrow.array(["1.png"])], ["bytes", "path"])
    table = InMemoryTable(pyarrow.table({"image": cells, "label": [0]}))
    rows = concatenate_datasets([Dataset(table, fingerprint="one")] * 3)
    found = encoded_images({"train": rows}, tmp_path)["train"]
    assert found.features["image"] == ImageFeature(decode=False) and len(found) == 3


@pytest.mark.parametrize("how", ["absolute", "relative", "below", "windows", "struct"])
def test_names_of_files(tmp_path, how):
    files = tmp_path / "photos" / "deep"
    files.mkdir(parents=True)
    names = []
    for i, image in enumerate(COLOUR):
        Image.fromarray(image).save(files / f"{i}.png")
        name = {"relative": f"{i}.png", "windows": f"deep\\{i}.png"}.get(how, f"deep/{i}.png")
        names.append(str(files / f"{i}.png") if how == "absolute" else name)
    if how == "relative":
        files.rename(tmp_path / "flat")
    folder = tmp_path / ("flat" if how == "relative" else "photos")
    feature = Value("string")
    if how == "struct":
        feature = {"bytes": Value("binary"), "path": Value("string")}
        names = [{"bytes": None, "path": name} for name in names]
    rows = make(names, feature, "file").add_column("note", ["", "x", "y", "z"])
    rows.save_to_disk(str(folder))
    np.testing.assert_array_equal(decoded(read(folder)["train"]), COLOUR)


def test_a_file_that_is_missing_is_an_unreadable_image(tmp_path):
    for i, image in enumerate(COLOUR):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    names = [f"{i % 4}.png" for i in range(8)]
    names[5] = "nothing.png"
    make(names, Value("string"), "file").save_to_disk(str(tmp_path))
    data = DataConfig(dataset_name=str(tmp_path), train_val_split=0.5)
    splits = load_splits(data)
    with pytest.raises(UserError, match=r"train row 5: no image file .*nothing\.png"):
        prepare_splits(splits, VIEW, DataConfig())


def test_strings_that_name_no_files_are_no_images(save):
    folder = save(train=make(["a.png", "b.png"], Value("string"), "file"))
    with pytest.raises(UserError, match=r"none of the columns .* is an image column"):
        read(folder)
    with pytest.raises(UserError, match=r"'file' holds .*, not images or file names in"):
        read(folder, image_column_name="file")


@pytest.mark.parametrize(
    ("cells", "feature", "expected"),
    [
        (GREY, Array2D((8, 6), "uint8"), rgb(GREY)),
        (COLOUR, Array3D((8, 6, 3), "uint8"), COLOUR),
        (COLOUR.transpose(0, 3, 1, 2), Array3D((3, 8, 6), "uint8"), COLOUR),
        (COLOUR.transpose(0, 3, 1, 2) / 255, Array3D((3, 8, 6), "float32"), COLOUR),
        (COLOUR / 255, Array3D((8, 6, 3), "float64"), COLOUR),
        (COLOUR.astype(float), Array3D((8, 6, 3), "float32"), COLOUR),
        (GREY[:, None], Array3D((1, 8, 6), "uint8"), rgb(GREY)),
        (GREY[..., None] / 255, Array3D((8, 6, 1), "float32"), rgb(GREY)),
        (GREY, nested(List, 2, "int64"), rgb(GREY)),
        (GREY.astype(int), nested(LargeList, 2, "int32"), rgb(GREY)),
        (COLOUR, nested(List, 3, "int64"), COLOUR),
        (COLOUR.transpose(0, 3, 1, 2), nested(List, 3, "uint8"), COLOUR),
        (GREY > 99, nested(List, 2, "bool"), rgb((GREY > 99) * 255)),
        ((GREY > 99) * 1, nested(List, 2, "int8"), rgb((GREY > 99) * 255)),
        (SQUARE[..., 0].reshape(4, 64), nested(List, 1, "int64"), rgb(SQUARE[..., 0])),
        (SQUARE.transpose(0, 3, 1, 2).reshape(4, 192), nested(List, 1, "uint8"), SQUARE),
        (SQUARE[..., 0].reshape(4, 64) / 255, nested(List, 1, "float32"), rgb(SQUARE[..., 0])),
    ],
)  # fmt: skip
def test_numbers_are_read_exactly(save, caplog, cells, feature, expected):
    caplog.set_level("INFO")
    cells = list(cells) if isinstance(feature, (Array2D, Array3D)) else np.asarray(cells).tolist()
    folder = save(train=make(cells, feature), test=make(cells[1:3], feature))
    loaded = read(folder)
    np.testing.assert_array_equal(decoded(loaded["train"]), expected)
    np.testing.assert_array_equal(decoded(loaded["test"]), expected[1:3])
    assert loaded["train"]["label"][:] == [0, 1, 0, 1] and "read as" in caplog.text
    assert loaded["train"].column_names == ["image", "label"]


def test_transparent_pixels_are_over_white(save):
    pixels = np.dstack([COLOUR[0], np.zeros((8, 6), np.uint8)])[None]
    (found,) = decoded(read(save(train=make(pixels.tolist(), nested(List, 3, "uint8"))))["train"])
    assert (found == 255).all()


def test_the_layout_of_flat_colours_is_that_of_smooth_images(save, photo, caplog):
    caplog.set_level("INFO")
    pictures = np.stack([np.asarray(photo(16, 16, seed)) for seed in range(4)])
    for cells, said in (
        (pictures.reshape(4, -1), "red, green and blue of each pixel together"),
        (pictures.transpose(0, 3, 1, 2).reshape(4, -1), "all red values first"),
    ):
        caplog.clear()
        loaded = read(save(train=make(cells.tolist(), nested(List, 1, "int64"))))
        np.testing.assert_array_equal(decoded(loaded["train"]), pictures)
        assert f"numbers from {pictures.min()} to {pictures.max()}" in caplog.text
        assert f"colour of 16 x 16 px, {said}" in caplog.text


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        (np.linspace(0, 4095, 48).round(), "I;16"),
        (np.linspace(0, 65535, 48).round(), "I;16"),
        (np.linspace(-1000, 3000, 48).round(), "I"),
        (np.linspace(0, 1e6, 48).round(), "I"),
        (np.linspace(0, 1, 48), "F"),
        (np.linspace(-1, 1, 48), "F"),
        (np.linspace(0, 200.5, 48), "F"),
    ],
)
def test_more_than_eight_bits_stay_exact(save, values, mode):
    cells = [values.reshape(8, 6).tolist(), values[::-1].reshape(8, 6).tolist()]
    loaded = read(save(train=make(cells, nested(List, 2, "float64"))))
    for cell, expected in zip(loaded["train"]["image"], cells, strict=True):
        with Image.open(io.BytesIO(cell["bytes"])) as image:
            assert image.mode.startswith(mode)
            np.testing.assert_array_equal(np.asarray(image), np.float32(expected))


def test_sizes_may_differ_and_images_may_be_missing(save):
    cells = [COLOUR[0].tolist(), None, COLOUR[1, :5].tolist(), COLOUR[2, :, :4].tolist()] * 2
    folder = save(train=make(cells, nested(List, 3, "int64")))
    rows = read(folder)["train"]
    assert rows["image"][1]["bytes"] is None
    for row, expected in ((0, COLOUR[0]), (2, COLOUR[1, :5]), (3, COLOUR[2, :, :4])):
        np.testing.assert_array_equal(decode_cell(rows[row]["image"]), expected)
    splits = load_splits(DataConfig(dataset_name=str(folder), train_val_split=0.5))
    with pytest.raises(
        UserError, match=r"2 images cannot be read, train rows 1, 5.* cell is empty"
    ):
        prepare_splits(splits, VIEW, DataConfig())


@pytest.mark.parametrize(
    ("cells", "depth", "message"),
    [
        (COLOUR[:, :, :3].transpose(0, 2, 1, 3), 3, "shape 3 x 8 x 3, which could have its channels f"),
        (COLOUR[..., :2], 3, "shape 8 x 6 x 2, which is not an image"),
        (GREY[:, :, :2], 2, "shape 8 x 2, which is not an image"),
        (GREY.reshape(4, 48)[:, :47], 1, "lists of 47 numbers, neither a grey square"),
        (GREY.reshape(4, 48)[:, :4], 1, "lists of 4 numbers, neither"),
        ([[1] * 64, [1] * 16], 1, "lists of 16, 64 numbers"),
        ([[[1] * 8] * 8, [[1] * 8] * 7 + [[1] * 7]], 2, "train row 1: its lists have different lengths"),
        ([[[1] * 8] * 8, [[1] * 8] * 7 + [[None] * 8]], 2, "train row 1: .* lack a number"),
        ([[[1] * 8] * 8, [[1] * 8] * 7 + [[float("nan")] * 8]], 2, "train row 1: a pixel is missing"),
        (COLOUR * 10.0, 3, r"colours from \d+ to \d+; scale them"),
        (COLOUR - 128.0, 3, r"colours from -1\d+ to 1\d+; .*undo"),
        ([None, None], 2, "the image column of train has no numbers"),
    ],
)  # fmt: skip
def test_numbers_that_are_no_images_are_refused(save, cells, depth, message):
    cells = (cells * 1).tolist() if isinstance(cells, np.ndarray) else cells
    folder = save(train=make(cells, nested(List, depth, "float64")))
    with pytest.raises(UserError, match=message):
        read(folder)


def test_a_later_split_is_read_like_the_first(save):
    feature = nested(List, 2, "float64")
    dark = np.ones((2, 8, 6))  # on its own, it would be times 255
    loaded = read(save(train=make(GREY.tolist(), feature), test=make(dark.tolist(), feature)))
    assert (np.array(decoded(loaded["test"])) == 1).all()
    bright = dark * 300
    with pytest.raises(UserError, match="test row 0: numbers from 300 to 300, unlike the images"):
        read(save(train=make(GREY.tolist(), feature), test=make(bright.tolist(), feature)))


def test_images_take_precedence_over_numbers(save, make_rows):
    rows = make_rows([0, 1] * 2).add_column("image", GREY.reshape(4, 48).tolist())
    assert decoded(read(save(train=rows))["train"])[0].shape == (8, 8, 3)


def test_a_stream_of_bytes_is_read_and_numbers_are_refused(tmp_path, datasets_cache):
    folder = tmp_path / "stream"
    folder.mkdir()
    features = Features({"picture": Value("binary"), "label": ClassLabel(names=["a", "b"])})
    cells = [encode(Image.fromarray(image)) for image in COLOUR] * 4
    rows = Dataset.from_dict({"picture": cells, "label": [0, 0, 1, 1] * 4}, features=features)
    rows.to_parquet(str(folder / "train.parquet"))
    options = {"dataset_name": str(folder), "streaming": True, "max_eval_samples": 8}
    splits = load_splits(DataConfig(train_val_split=0.7, **options))
    assert all(any((i == c).all() for c in COLOUR) for i in splits.validation.pictures(""))
    rows = rows.remove_columns("picture").add_column("picture", GREY.tolist() * 4)
    rows.to_parquet(str(folder / "train.parquet"))
    with pytest.raises(UserError, match="is an image column"):
        load_splits(DataConfig(**options))
