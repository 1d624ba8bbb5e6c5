"""hf_cifar.data.cache: a later run finds the same pixels, and never wrong ones."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from datasets import Image

from hf_cifar.config.data import DataConfig
from hf_cifar.data import cache
from hf_cifar.data import images as images_module
from hf_cifar.data.cache import content_key, load_array, save_array
from hf_cifar.data.splits import load_splits


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CIFAR_CACHE", str(tmp_path / "pixels"))
    return tmp_path / "pixels"


@pytest.fixture
def load():
    """Return a function (folder) -> train split that loads like a new process."""

    return lambda path: load_splits(DataConfig(dataset_name=str(path))).train


def undecoded(rows):
    return rows.rename_column("img", "image").cast_column("image", Image(decode=False))


def files(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_the_next_run_decodes_nothing(save, make_rows, load, monkeypatch):
    path = save(train=make_rows([0, 1] * 10))
    first = np.asarray(load(path).images)
    decoded = []
    original = images_module.decode_cell
    for module in ("hf_cifar.data.images", "hf_cifar.data.pixels"):
        monkeypatch.setattr(
            f"{module}.decode_cell", lambda c, *a: decoded.append(c) or original(c, *a)
        )
    again = load(path).images
    assert (np.asarray(again) == first).all()
    assert len(decoded) == 1  # the first image, to get its size


def test_changed_data_at_the_same_path_are_decoded_again(tmp_path, make_rows, load):
    from datasets import DatasetDict

    path = tmp_path / "data"
    for seed in (10, 11):
        rows = make_rows([0, 1] * seed)
        DatasetDict(train=rows).save_to_disk(str(path))
        train = load(path)
        for row, image in zip(train.row_ids, train.images, strict=True):
            assert (image == np.asarray(rows[int(row)]["img"])).all()


def test_key_depends_on_content_and_order(make_rows):
    rows = undecoded(make_rows([0, 1] * 5))
    assert content_key(rows) == content_key(undecoded(make_rows([0, 1] * 5)))
    others = [rows.select(range(9)), rows.select([1, 0, *range(2, 10)])]
    keys = {content_key(r) for r in (rows, *others)}
    assert len(keys) == 3
    assert content_key(others[1].select([1, 0, *range(2, 10)])) == content_key(rows)


def test_changed_image_file_changes_the_key(tmp_path, make_rows):
    from datasets import Dataset, Features

    path = tmp_path / "image.png"
    picture = make_rows([0])[0]["img"]
    picture.save(path)
    cells = {"image": [{"bytes": None, "path": str(path)}]}
    rows = Dataset.from_dict(cells, features=Features({"image": Image(decode=False)}))
    before = content_key(rows)
    assert content_key(rows) == before
    os.utime(path, (1, 1))
    assert content_key(rows) != before
    path.unlink()
    assert content_key(rows) != before


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_a_damaged_file_is_decoded_again(save, make_rows, load, folder, damage, caplog):
    path = save(train=make_rows([0, 1] * 10))
    first = np.asarray(load(path).images)
    (name,) = [name for name in files(folder) if "unreadable" not in name]
    content = bytearray((folder / name).read_bytes())
    if damage == "flipped":
        content[-7] ^= 0x10
    kept = {"cut": content[:-100], "flipped": content, "text": b"not pixels"}[damage]
    (folder / name).write_bytes(bytes(kept))
    assert (np.asarray(load(path).images) == first).all()
    array = load_array(name.removesuffix(".safetensors"))  # written again
    assert (array[load(path).row_ids] == first).all()
    assert (f"{name} is damaged" in caplog.text) == (damage == "flipped")


def test_read_only_cache_folder_only_costs_time(
    save, make_rows, load, tmp_path, monkeypatch, caplog
):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("HF_CIFAR_CACHE", str(tmp_path / "a_file" / "cache"))
    assert load(save(train=make_rows([0, 1] * 5))).images[:].shape == (8, 8, 8, 3)
    assert f"cannot cache in {tmp_path / 'a_file' / 'cache'}" in caplog.text


def test_least_recently_used_file_is_deleted_first(folder, monkeypatch):
    pixels = np.zeros((10, 4, 4, 3), np.uint8)
    monkeypatch.setattr(cache, "SIZE_LIMIT", 1500)
    for age, key in ((300, "a"), (200, "b")):
        save_array(key, pixels)
        os.utime(folder / f"{key}.safetensors", (time.time() - age,) * 2)
    assert load_array("a") is not None  # recently used: b is the older one
    save_array("c", pixels)
    assert files(folder) == ["a.safetensors", "c.safetensors"]
    assert not list(folder.glob(".*tmp"))


def test_leftovers_of_a_killed_process_are_removed(folder):
    (folder / ".a.tmp").mkdir(parents=True)
    (folder / ".a.tmp" / ".tmp1234").write_bytes(b"half")
    save_array("a", np.zeros((2, 2, 2, 3), np.uint8))
    assert sorted(path.name for path in folder.iterdir()) == ["a.safetensors"]


COUNT_DECODED = """
import sys
from hf_cifar.data import images
from hf_cifar.data.splits import load_splits
from hf_cifar.config.data import DataConfig
decoded, original = [], images.decode_image
images.decode_image = lambda *given: decoded.append(1) or original(*given)
pixels = load_splits(DataConfig(dataset_name=sys.argv[1])).train.images[:]
print(len(decoded), int(pixels.sum()))
"""


@pytest.mark.slow
def test_only_one_of_many_processes_decodes(save, make_rows):
    path = save(train=make_rows([0, 1] * 100))
    command = [sys.executable, "-c", COUNT_DECODED, str(path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = sorted(worker.communicate(timeout=100)[0].split() for worker in workers)
    assert sorted(int(decoded) for decoded, _ in results) == [1, 1 + 200]  # 1: for its size
    assert results[0][1] == results[1][1]
