"""hf_cifar.data.pixels: images are prepared once, whichever rows are used, and never wrongly."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image

from hf_cifar.config.data import DataConfig
from hf_cifar.data import pixels as pixels_module
from hf_cifar.data import preparation
from hf_cifar.data.cache import make_room
from hf_cifar.data.pixel_file import MISSING, STORED, PixelFile
from hf_cifar.data.pixels import Form, Pixels
from hf_cifar.data.preparation import SplitImages
from hf_cifar.data.split import Split, prepare_split, subset
from hf_cifar.data.splits import DataSource, load_splits, prepare_splits
from hf_cifar.data.store import build_store
from hf_cifar.data.stratify import stratified
from hf_cifar.errors import UserError
from hf_cifar.transforms.preprocessing import Preprocessing

VIEW = Preprocessing((12, 12), None, "bicubic", (0.5,) * 3, (0.5,) * 3)
MIXED = ((90, 70), (70, 90), (80, 80))
EVERYTHING = {"kind": "disk"}


@pytest.fixture(autouse=True)
def folder(pixel_cache):
    return pixel_cache


@pytest.fixture
def decoded(monkeypatch):
    """Record each decoded cell; those of the survey are not counted."""
    cells, original = [], Pixels.decode_cell

    def count(self, cell):
        if sys._getframe(1).f_code.co_name == "_render":
            cells.append(cell)
        return original(self, cell)

    monkeypatch.setattr(Pixels, "decode_cell", count)
    monkeypatch.setattr(SplitImages, "seconds", 0.0)  # its sample is decoded, too
    return cells


def load(folder, **options):
    return load_splits(DataConfig(dataset_name=str(folder), **options))


def parts(splits):
    return splits.train, splits.validation


def ready(split, **options):
    return prepare_split(split, VIEW, **options)


def pictures(rows):
    return [np.asarray(image) for image in rows["img"]]


def check(split, expected):
    """Small images of one size are kept as they are."""
    images, readable = split.images.read(np.arange(len(split)))
    assert readable.all()
    for row, image in zip(split.row_ids, images, strict=True):
        assert (image == expected[row]).all()


def damaged(rows, *broken):
    rows = rows.cast_column("img", type(rows.features["img"])(decode=False))
    cells = rows["img"][:]
    for row in broken:
        cells[row] = {"bytes": b"no image", "path": None}
    return type(rows).from_dict({"img": cells, "label": rows["label"][:]}, rows.features)


def image_rows(files):
    cells = [{"bytes": None, "path": str(path)} for path in files]
    return Dataset.from_dict({"image": cells}, features=Features({"image": Image(decode=False)}))


def test_another_seed_or_share_decodes_nothing(save, make_rows, decoded, folder):
    rows = make_rows([0, 1] * 20)
    path = save(train=rows)
    for options in ({"split_seed": 0}, {"split_seed": 1}, {"train_val_split": 0.4}):
        for split in parts(load(path, **options)):
            check(ready(split), pictures(rows))
        assert len(decoded) == 40
    assert len(list(folder.glob("*.pixels"))) == 1


def test_folds_are_row_numbers_into_one_tensor(save, make_rows, decoded):
    rows = make_rows([0, 1] * 20)
    source = DataSource(DataConfig(dataset_name=str(save(train=rows))))
    shared = source.pixels("train")
    labels = np.array([0, 1] * 20)
    folds = [stratified(labels, 0.25, ["cat", "dog"], seed, "train") for seed in range(4)]
    for train, validation in folds:
        stores = [
            build_store(ready(Split("fold", shared, rows_of)), skips=False)
            for rows_of in (train, validation)
        ]
        assert stores[0].pixels is stores[1].pixels
    assert len(decoded) == 40


def test_small_part_decodes_its_own_rows_only(save, make_rows, decoded):
    rows = make_rows([0, 1] * 50)
    path = save(train=rows)
    options = {"max_train_samples": 20, "max_eval_samples": 4}
    for _ in range(2):
        for split in parts(load(path, **options)):
            check(ready(split), pictures(rows))
        assert len(decoded) == 24
    check(ready(load(path).train), pictures(rows))
    assert len(decoded) <= 24 + 90


def test_images_of_mixed_sizes_are_stored_as_the_library_resizes_them(save, make_rows, folder):
    rows = make_rows([0, 1] * 20, sizes=MIXED)
    path = save(train=rows)
    splits = load(path)
    for augmented in (False, True):
        for split in map(lambda each, a=augmented: ready(each, augmented=a), parts(splits)):
            view = VIEW.stored(augmented=augmented)
            images, _ = split.images.read(np.arange(len(split)))
            assert images.shape[1:3] == ((14, 14) if augmented else (12, 12))
            for row, image in zip(split.row_ids, images, strict=True):
                assert (image == view.view_image(pictures(rows)[row])).all()
    assert len(list(folder.glob("*.pixels"))) == 2  # with a margin, and exact


@pytest.mark.parametrize("odd", [28, 31], ids=["in the estimate", "in the pass"])
def test_odd_size_among_many_is_found_in_time(save, make_rows, monkeypatch, odd):
    """The sample sees one size only, and one image of 60 has another one."""
    monkeypatch.setattr(pixels_module, "NUM_SURVEYED", 2)
    sizes = [(8, 8)] * 60
    sizes[odd] = (9, 8)
    rows = make_rows([0, 1] * 30, sizes=sizes)
    split = ready(load(save(train=rows, validation=make_rows([0, 1]))).train)
    assert split.images.prepared.form.view == VIEW.stored(augmented=False)
    images, readable = split.images.read(np.array([30, odd]))
    assert readable.all()
    assert (images[1] == VIEW.view_image(pictures(rows)[odd])).all()


def test_bad_images_are_skipped_and_tried_again(save, make_rows, decoded):
    rows = make_rows([0, 1] * 20)
    path = save(train=damaged(rows, 0, 7))
    for count in (40, 42):
        found = [ready(split, on_bad_image="skip") for split in parts(load(path))]
        assert sorted(row for split in found for row in split.skipped) == [0, 7]
        for split in found:
            check(split, pictures(rows))
        assert len(decoded) == count


def test_image_that_becomes_readable_is_decoded(tmp_path, make_rows):
    files = []
    for number, picture in enumerate(make_rows([0, 1] * 10)["img"]):
        files.append(tmp_path / f"{number}.png")
        picture.save(files[-1])
    content, status = files[3].read_bytes(), files[3].stat()

    def rewrite(data):
        """Write a file of the same size and modification time, so that the key stays the same."""
        files[3].write_bytes(data)
        os.utime(files[3], ns=(status.st_atime_ns, status.st_mtime_ns))

    everything = np.arange(20)

    def prepared():
        found = Pixels("train", image_rows(files)).prepared(Form((8, 8)))
        found.prepare(everything, "preparing")
        return found

    rewrite(bytes(len(content)))
    assert list(prepared().unreadable(everything)) == [3]
    rewrite(content)
    found = prepared()
    assert not found.unreadable(everything)
    assert (found.read(everything)[0][3] == np.asarray(make_rows([0, 1] * 10)["img"][3])).all()


def test_faults_depend_on_the_limit_on_pixels(save, make_rows):
    rows = make_rows([0, 1] * 20, sizes=((8, 8), (8, 8), (9, 9)))
    path = save(train=rows)
    few = [ready(split, on_bad_image="skip") for split in parts(load(path, max_image_pixels=80))]
    assert sum(len(split.skipped) for split in few) == 13
    assert sum(len(ready(split)) for split in parts(load(path))) == 40


def test_pixel_hash_is_of_the_selected_images_in_order(save, make_rows):
    rows = make_rows([0, 1] * 20)
    train = ready(load(save(train=rows)).train)
    chosen = rows.select(train.row_ids)
    alone = ready(load(save(train=chosen, validation=make_rows([0, 1]))).train)
    assert train.images.pixel_hash == alone.images.pixel_hash
    assert subset(train, np.arange(30)).images.pixel_hash != train.images.pixel_hash


def test_nothing_is_decoded_before_it_is_needed(save, make_rows, decoded, folder):
    splits = load(save(train=make_rows([0, 1] * 20, sizes=MIXED)), check_images="used")
    assert not decoded and not folder.exists()
    options = DataConfig(check_images="used", pixel_store="disk")
    splits = prepare_splits(splits, VIEW, options)
    assert len(decoded) == len(splits.validation) == 4
    assert splits.train.images.pixel_hash is None
    store = build_store(splits.train)
    store.__getitems__([0, 5])
    store.__getitems__([5, 6])
    assert len(decoded) == 4 + 3


# --- the file


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3), dtype=np.uint8)


def test_rows_are_read_back_in_any_order(tmp_path):
    file, images = PixelFile(tmp_path / "a", 10, (4, 5)), noise(10)
    for row in (7, 2, 3, 4, 9):
        file.write(row, images[row])
    rows = np.array([2, 3, 4, 9, 0, 3, 7])
    found, stored = file.read(rows)
    assert stored.tolist() == [True, True, True, True, False, True, True]
    assert (found[stored] == images[rows[stored]]).all()
    assert (pickle.loads(pickle.dumps(file)).read(rows)[0][stored] == found[stored]).all()


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_rows_count_as_missing(tmp_path, damage, caplog):
    images = noise(6)
    file = PixelFile(tmp_path / "a", 6, (4, 5))
    for row in range(6):
        file.write(row, images[row])
    path, size = tmp_path / "a.pixels", 4 * 5 * 3
    content = bytearray(path.read_bytes())
    content[3 * size + 7] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(content) if damage == "flipped" else bytes(content[: 3 * size + 8]))
    lost = {"flipped": [3], "cut": [3, 4, 5], "gone": [*range(6)]}[damage]
    again = PixelFile(tmp_path / "a", 6, (4, 5))
    found, stored = again.read(np.arange(6))
    assert np.flatnonzero(~stored).tolist() == lost
    assert (found[stored] == images[stored]).all()
    assert again.states(np.array(lost)).tolist() == [MISSING] * len(lost)
    assert f"row {lost[0]} is damaged and will be decoded again" in caplog.text


def test_file_of_another_number_of_rows_is_not_reused(tmp_path):
    PixelFile(tmp_path / "a", 6, (4, 5)).write(0, noise(1)[0])
    assert (PixelFile(tmp_path / "a", 7, (4, 5)).states(np.arange(7)) == MISSING).all()


def test_a_worker_finds_the_file_deleted_by_another_run(tmp_path):
    file = PixelFile(tmp_path / "a", 4, (4, 5))
    file.write(2, noise(4)[2])
    sent = pickle.dumps(file)
    for path in tmp_path.iterdir():
        path.unlink()
    assert not pickle.loads(sent).read(np.arange(4))[1].any()
    assert file.read(np.arange(4))[1].tolist() == [False, False, True, False]


def test_full_disk_only_costs_time(save, make_rows, monkeypatch, caplog):
    rows = make_rows([0, 1] * 20)
    calls = []

    def write(self, row, image):
        calls.append(row)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PixelFile, "write", write)
    split = ready(load(save(train=rows)).train, **EVERYTHING)
    check(split, pictures(rows))
    assert "No space left on device; the other images are decoded at each use" in caplog.text


def test_unwritable_cache_only_costs_time(save, make_rows, tmp_path, monkeypatch, caplog):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("HF_CIFAR_CACHE", str(tmp_path / "a_file" / "cache"))
    rows = make_rows([0, 1] * 5)
    check(ready(load(save(train=rows)).train), pictures(rows))
    assert f"cannot cache in {tmp_path / 'a_file' / 'cache'}" in caplog.text


def test_make_room_keeps_the_files_in_use_and_both_of_their_parts(folder, monkeypatch):
    folder.mkdir()
    used = PixelFile(folder / "a", 4, (64, 64))
    for age, name in ((300, "a"), (200, "b"), (100, "c")):
        file = used if name == "a" else PixelFile(folder / name, 4, (64, 64))
        for row in range(4):
            file.write(row, np.zeros((64, 64, 3), np.uint8))
        for suffix in (".rows", ".pixels"):
            os.utime(folder / f"{name}{suffix}", (1e9 - age,) * 2)
    monkeypatch.setattr("hf_cifar.data.cache.SIZE_LIMIT", 130_000)
    del file
    make_room(folder, 0)
    assert {path.stem for path in folder.iterdir()} == {"a", "c"}
    assert (PixelFile(folder / "a", 4, (64, 64)).states(np.arange(4)) == STORED).all()


def test_prepared_splits_above_the_limit_do_not_delete_each_other(
    save, make_rows, folder, monkeypatch
):
    monkeypatch.setattr("hf_cifar.data.cache.SIZE_LIMIT", 1)
    path = save(train=make_rows([0, 1] * 20), validation=make_rows([0, 1] * 10))
    kept = [ready(split, **EVERYTHING) for split in parts(load(path))]
    assert len(list(folder.glob("*.pixels"))) == len(kept) == 2


def test_make_room_beside_another_process_that_deletes(folder, monkeypatch):
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.safetensors").write_bytes(bytes(100))
    original = Path.stat

    def stat(path, **options):
        if path.name == "a.safetensors":
            path.unlink(missing_ok=True)
        return original(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr("hf_cifar.data.cache.SIZE_LIMIT", 1)
    make_room(folder, 0)
    assert not list(folder.iterdir())


def test_images_that_turn_out_to_be_larger_are_kept_where_they_fit(save, make_rows, monkeypatch):
    monkeypatch.setattr(pixels_module, "NUM_SURVEYED", 2)
    monkeypatch.setattr(preparation, "MEMORY_LIMIT", 60 * 8 * 8 * 3)
    sizes = [(8, 8), *[(90, 90)] * 58, (8, 8)]
    rows = make_rows([0, 1] * 30, sizes=sizes)
    split = ready(load(save(train=rows, validation=make_rows([0, 1]))).train)
    assert split.images.kind == "disk"


COUNT_DECODED = """
import sys
import numpy as np
from hf_cifar.data import pixels
from hf_cifar.data.split import prepare_split
from hf_cifar.data.splits import load_splits
from hf_cifar.config.data import DataConfig
from hf_cifar.transforms.preprocessing import Preprocessing
decoded, original = [], pixels.Prepared._render
pixels.Prepared._render = lambda self, *given, **kept: decoded.append(1) or original(self, *given, **kept)
pixels.Prepared.seconds = lambda self, positions: 0
view = Preprocessing((12, 12), None, "bicubic", (0.5,) * 3, (0.5,) * 3)
split = prepare_split(load_splits(DataConfig(dataset_name=sys.argv[1])).train, view)
print(len(decoded), int(split.images.read(np.arange(len(split)))[0].sum()))
"""


@pytest.mark.slow
def test_only_one_of_many_processes_decodes(save, make_rows):
    path = save(train=make_rows([0, 1] * 100))
    command = [sys.executable, "-c", COUNT_DECODED, str(path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = sorted(worker.communicate(timeout=100)[0].split() for worker in workers)
    assert sorted(int(count) for count, _ in results) == [0, 180]
    assert results[0][1] == results[1][1]


def test_interrupted_pass_continues(save, make_rows, decoded, monkeypatch):
    monkeypatch.setattr(pixels_module, "TASK", 4)
    path = save(train=make_rows([0, 1] * 100, sizes=MIXED))
    original = PixelFile.write

    def write(self, row, image):
        if len(decoded) > 70:
            raise KeyboardInterrupt
        original(self, row, image)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PixelFile, "write", write)
        ready(load(path).train, **EVERYTHING)
    first = len(decoded)
    assert 70 < first < 180
    split = ready(load(path).train, **EVERYTHING)
    assert len(decoded) - first <= 180 - 60
    assert split.images.pixel_hash is not None


def test_unreadable_image_names_its_row(save, make_rows):
    rows = damaged(make_rows([0, 1] * 10), 3)
    with pytest.raises(UserError, match=r"^train row 3: cannot read image: not a known image"):
        for split in parts(load(save(train=rows))):
            ready(split)
