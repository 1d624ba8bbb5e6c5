"""hf_cifar.data.cache: a later run finds the same pixels, and never wrong ones."""

import os
import time

import numpy as np
import pytest
from datasets import Image

from hf_cifar.data import cache
from hf_cifar.data.cache import content_key, load_array, save_array


@pytest.fixture(autouse=True)
def folder(pixel_cache):
    return pixel_cache


def undecoded(rows):
    return rows.rename_column("img", "image").cast_column("image", Image(decode=False))


def files(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


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


def test_least_recently_used_file_is_deleted_first(folder, monkeypatch):
    pixels = np.zeros((10, 20, 20, 3), np.uint8)
    monkeypatch.setattr(cache, "SIZE_LIMIT", 30_000)
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


def test_damaged_file_is_recomputed(folder, caplog):
    array = np.arange(100, dtype=np.uint8)
    for damage in ("cut", "flipped", "text"):
        save_array("a", array)
        path = folder / "a.safetensors"
        content = bytearray(path.read_bytes())
        content[-7] ^= 0x10
        kept = {"cut": content[:-100], "flipped": content, "text": b"not pixels"}[damage]
        path.write_bytes(bytes(kept))
        assert load_array("a") is None
    assert caplog.text.count("is damaged") == 1  # the other files are no arrays at all
