"""hf_cifar.data.unlabelled: the images of any data set, in a fixed order, without labels."""

import io
import os
import shutil

import numpy as np
import pyarrow
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet

from hf_cifar.config.data import DataConfig
from hf_cifar.data.images import decode_cell
from hf_cifar.data.unlabelled import load_images
from hf_cifar.errors import UserError


def opened(path, split=None, **options):
    return load_images(DataConfig(dataset_name=str(path), **options), split)


def cells(images):
    return images.cells(range(len(images)))


@pytest.fixture
def plain(tmp_path):
    """A folder of five images in no particular order, without classes, and a file of notes."""
    folder = tmp_path / "plain"
    generator = np.random.default_rng(0)
    for name in ("b/2", "a", "b/1", "c", "z"):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    (folder / "notes.md").write_text("text")
    return folder


def test_a_folder_needs_no_classes(plain, caplog):
    caplog.set_level("INFO", logger="hf_cifar")
    images = opened(plain)
    names = ["a.png", "b/1.png", "b/2.png", "c.png", "z.png"]
    assert [images.name(cell) for cell in cells(images)] == names
    assert caplog.messages == ["plain: 5 images; left out: 1 file (1 .md)"]
    for name, cell in zip(names, cells(images), strict=True):
        assert np.array_equal(decode_cell(cell), np.asarray(Image.open(plain / name)))


def test_splits_of_a_folder(stripes):
    assert [len(opened(stripes, split)) for split in (None, "train", "test")] == [102, 80, 22]
    whole = opened(stripes)
    names = [whole.name(cell) for cell in cells(whole)]
    assert names[79:81] == ["train/down/039.png", "test/across/000.png"]  # train comes first
    with pytest.raises(UserError, match="has no split validation, only train, test"):
        opened(stripes, "validation")


def test_an_archive_is_read_as_its_folder(plain, tmp_path, pixel_cache):
    shutil.make_archive(str(tmp_path / "packed"), "zip", plain)
    packed = opened(tmp_path / "packed.zip")
    names = [packed.name(cell) for cell in cells(packed)]
    assert names == ["a.png", "b/1.png", "b/2.png", "c.png", "z.png"]
    assert packed.hash == opened(plain).hash
    (tmp_path / "archives").mkdir()
    (tmp_path / "packed.zip").rename(tmp_path / "archives" / "one.zip")
    archives = opened(tmp_path / "archives")
    assert [archives.name(cell) for cell in cells(archives)] == [f"one/{name}" for name in names]


def test_parquet_without_labels(plain, tmp_path, datasets_cache):
    files = sorted(plain.rglob("*.png"))
    (tmp_path / "data").mkdir()
    for part in range(2):
        chosen = files[part::2]
        rows = {
            "id": list(range(len(chosen))),
            "picture": [{"bytes": path.read_bytes(), "path": path.name} for path in chosen],
        }
        features = Features(
            {"id": Dataset.from_dict({"id": [0]}).features["id"], "picture": ImageFeature()}
        )
        Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "data" / f"{part}.parquet"))
    images = opened(tmp_path / "data")
    assert [images.name(cell) for cell in cells(images)] == [
        "a.png",
        "2.png",
        "z.png",
        "1.png",
        "c.png",
    ]
    plain_bytes = tmp_path / "bytes.parquet"
    parquet.write_table(pyarrow.table({"img": [path.read_bytes() for path in files]}), plain_bytes)
    assert [images.name(cell) for cell in cells(opened(plain_bytes))] == [None] * 5
    with pytest.raises(UserError, match="none of the columns id is an image column"):
        parquet.write_table(pyarrow.table({"id": [1, 2]}), tmp_path / "data" / "0.parquet")
        parquet.write_table(pyarrow.table({"id": [1, 2]}), tmp_path / "data" / "1.parquet")
        opened(tmp_path / "data")


def test_names_of_files_are_relative_to_the_table(plain, tmp_path, datasets_cache, monkeypatch):
    names = ["a.png", "b/1.png"]
    Dataset.from_dict({"file": names}).save_to_disk(str(plain / "saved"))
    for name in names:
        (plain / "saved" / name).parent.mkdir(exist_ok=True)
        shutil.copy(plain / name, plain / "saved" / name)
    monkeypatch.chdir(tmp_path)
    for path in ("plain/saved", tmp_path / "plain" / "saved"):
        images = opened(f"./{path}" if isinstance(path, str) else path)
        assert [images.name(cell) for cell in cells(images)] == names
        assert decode_cell(cells(images)[1]).shape == (4, 4, 3)


def test_numbers_as_images_without_labels(tmp_path, datasets_cache):
    values = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    Dataset.from_dict({"pixels": values.tolist()}).save_to_disk(str(tmp_path / "saved"))
    found = [decode_cell(cell) for cell in cells(opened(tmp_path / "saved"))]
    assert np.array_equal(np.stack(found), values)


def test_splits_of_saved_data_are_read_one_after_another(save, make_rows):
    folder = save(test=make_rows([1, 0]), train=make_rows([0, 1, 0]))
    whole = opened(folder)
    parts = [cells(opened(folder, split)) for split in ("train", "test")]
    assert cells(whole) == parts[0] + parts[1] and len(whole) == 5


def test_the_hash_is_that_of_names_sizes_and_content(plain, tmp_path):
    before = opened(plain).hash
    moved = tmp_path / "moved"
    shutil.copytree(plain, moved)
    assert opened(moved).hash == before
    os.utime(moved / "a.png", (0, 0))
    assert opened(moved).hash == before
    changes = {
        "renamed": lambda: (moved / "c.png").rename(moved / "d.png"),
        "content": lambda: Image.new("RGB", (4, 4), "red").save(moved / "a.png"),
        "removed": lambda: (moved / "z.png").unlink(),
    }
    seen = {before}
    for change in changes.values():
        change()
        seen.add(opened(moved).hash)
    assert len(seen) == 4


def test_a_damaged_image_and_an_empty_cell_have_a_hash(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    table = pyarrow.table({"image": [file.getvalue(), None, b"rubbish"]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    images = opened(tmp_path / "rows.parquet")
    assert len(images.hash) == 64
    assert [cell and len(cell["bytes"]) for cell in cells(images)][1:] == [None, 7]
