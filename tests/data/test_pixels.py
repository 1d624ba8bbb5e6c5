"""hf_cifar.data.pixels: the images of a source are decoded once, whichever rows are used."""

import gc
import os
import weakref

import numpy as np
import pytest

from hf_cifar.config.data import DataConfig
from hf_cifar.data import pixels as pixels_module
from hf_cifar.data.pixels import Pixels
from hf_cifar.data.split import Split, require_readable, subset
from hf_cifar.data.splits import DataSource, load_splits
from hf_cifar.data.stratify import stratified
from hf_cifar.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CIFAR_CACHE", str(tmp_path / "pixels"))
    return tmp_path / "pixels"


@pytest.fixture
def decoded(monkeypatch):
    """Record the number of images in each decoded batch; the first image, decoded for its size, is not
    counted."""
    counts, original = [], pixels_module.decode_cells

    def count(cells, *options):
        counts.append(len(cells))
        return original(cells, *options)

    monkeypatch.setattr(pixels_module, "decode_cells", count)
    return counts


def load(folder, **options):
    return load_splits(DataConfig(dataset_name=str(folder), **options))


def parts(splits):
    return splits.train, splits.validation


def arrays(folder):
    return [path.name for path in folder.glob("*.safetensors") if "unreadable" not in path.name]


def pictures(rows):
    return [np.asarray(image) for image in rows["img"]]


def check(split, expected):
    for row, image in zip(split.row_ids, split.images, strict=True):
        assert (image == expected[row]).all()


def damaged(rows, *broken):
    rows = rows.cast_column("img", type(rows.features["img"])(decode=False))
    cells = rows["img"][:]
    for row in broken:
        cells[row] = {"bytes": b"no image", "path": None}
    return type(rows).from_dict({"img": cells, "label": rows["label"][:]}, rows.features)


def test_another_split_seed_decodes_nothing(save, make_rows, decoded, folder):
    rows = make_rows([0, 1] * 20)
    path = save(train=rows)
    for seed in (0, 1):
        splits = load(path, split_seed=seed)
        for split in parts(splits):
            check(split, pictures(rows))
        assert decoded == [40]
    check(load(path, max_train_samples=8).train, pictures(rows))
    check(load(path, train_val_split=0.4).validation, pictures(rows))
    assert decoded == [40] and len(arrays(folder)) == 1


def test_folds_are_row_numbers_into_one_array(save, make_rows, decoded):
    rows = make_rows([0, 1] * 20)
    source = DataSource(DataConfig(dataset_name=str(save(train=rows))))
    shared = source.pixels("train")
    labels = np.array([0, 1] * 20)
    folds = [stratified(labels, 0.25, ["cat", "dog"], seed, "train") for seed in range(4)]
    splits = [Split("fold", shared, positions) for fold in folds for positions in fold]
    for split in (*splits, *parts(source.splits), subset(splits[0], np.arange(3))):
        check(split, pictures(rows))
        assert all(np.shares_memory(image, shared.images) for image in split.images)
    assert decoded == [40]


def test_small_part_is_decoded_on_its_own_and_only_once(save, make_rows, decoded, folder):
    rows = make_rows([0, 1] * 50)
    path = save(train=rows)
    options = {"max_train_samples": 20, "max_eval_samples": 4}
    for _ in range(2):
        for split in parts(load(path, **options)):
            check(split, pictures(rows))
        assert decoded == [20, 4]
    assert len(arrays(folder)) == 2
    check(load(path).train, pictures(rows))
    assert decoded == [20, 4, 100]
    check(load(path, max_train_samples=30).train, pictures(rows))  # found in the array of all
    assert decoded == [20, 4, 100]


def test_half_of_the_source_decodes_all_of_it(save, make_rows, decoded):
    path = save(train=make_rows([0, 1] * 20), validation=make_rows([0, 1]))
    for size, batches in ((18, [18]), (20, [18, 40])):
        assert len(load(path, max_train_samples=size).train.images) == size
        assert decoded == batches


def test_images_of_mixed_sizes_are_shared_in_memory(save, make_rows, decoded, folder):
    rows = make_rows([0, 1] * 20, sizes=((8, 8), (9, 7)))
    source = DataSource(DataConfig(dataset_name=str(save(train=rows))))
    for split in parts(source.splits):
        check(split, pictures(rows))
        assert all(any(each is image for each in source.pixels("train").images)
                   for image in split.images)  # fmt: skip
    assert decoded == [40] and not arrays(folder)


def test_bad_images_are_skipped_and_found_again(save, make_rows, decoded, folder):
    rows = make_rows([0, 1] * 20)
    path = save(train=damaged(rows, 0, 7))
    for _ in range(2):
        splits = load(path, on_bad_image="skip")
        require_readable(*parts(splits))
        assert sorted(row for split in parts(splits) for row in split.skipped) == [0, 7]
        for split in parts(splits):
            check(split, pictures(rows))
    # The next run retries the two.
    assert decoded == [40, 2] and len(arrays(folder)) == 1


def test_image_that_becomes_readable_is_decoded(tmp_path, save, make_rows, decoded):
    from datasets import Dataset, Features, Image

    files = []
    for number, picture in enumerate(make_rows([0, 1] * 10)["img"]):
        files.append(tmp_path / f"{number}.png")
        picture.save(files[-1])
    cells = [{"bytes": None, "path": str(path)} for path in files]
    rows = Dataset.from_dict({"image": cells}, features=Features({"image": Image(decode=False)}))
    content, status = files[3].read_bytes(), files[3].stat()
    readable = Pixels("train", rows)
    assert readable.hold() and not readable.faults
    first = readable.images.copy()

    def rewrite(data):
        """Write a file of the same size and modification time, so that the key stays the same."""
        files[3].write_bytes(data)
        os.utime(files[3], ns=(status.st_atime_ns, status.st_mtime_ns))

    for path in (tmp_path / "pixels").glob("*.safetensors"):
        path.unlink()
    rewrite(bytes(len(content)))
    broken = Pixels("train", rows)
    assert broken.hold() and list(broken.faults) == [3] and not broken.images[3].any()
    rewrite(content)
    mended = Pixels("train", rows)
    assert mended.hold() and not mended.faults
    assert (mended.images == first).all()


def test_faults_depend_on_the_limit_on_pixels(save, make_rows):
    rows = make_rows([0, 1] * 20, sizes=((8, 8), (8, 8), (9, 9)))
    path = save(train=rows)
    few = load(path, max_image_pixels=80, on_bad_image="skip")
    assert sum(len(split.skipped) for split in parts(few)) == 13
    for split in (*parts(few), *parts(load(path))):
        check(split, pictures(rows))
    assert sum(len(split) for split in parts(load(path, on_bad_image="skip"))) == 40
    path = save(train=make_rows([0, 1] * 20, sizes=((9, 9),)))
    require_readable(*parts(load(path)))
    with pytest.raises(UserError, match="40 images cannot be read"):
        require_readable(*parts(load(path, max_image_pixels=80)))


def test_pixel_hash_is_of_the_selected_images_in_order(save, make_rows):
    rows = make_rows([0, 1] * 20)
    train = load(save(train=rows)).train
    chosen = rows.select(train.row_ids)
    alone = load(save(train=chosen, validation=make_rows([0, 1]))).train
    assert train.pixel_hash == alone.pixel_hash
    assert subset(train, np.arange(30)).pixel_hash != train.pixel_hash


def test_arrays_are_freed_with_their_splits(save, make_rows):
    path = save(train=make_rows([0, 1] * 20), test=make_rows([0, 1] * 3))
    source = DataSource(DataConfig(dataset_name=str(path)))
    splits, test = source.splits, source.test_split
    require_readable(splits.train, splits.validation, test)
    found = [weakref.ref(split.images.pixels.images) for split in (splits.train, test)]
    assert all(each() is not None for each in found)
    del source, splits, test
    gc.collect()
    assert [each() for each in found] == [None, None]


def test_nothing_is_decoded_before_it_is_needed(save, make_rows, decoded, folder):
    load(save(train=make_rows([0, 1] * 20)))
    assert not decoded and not folder.exists()
