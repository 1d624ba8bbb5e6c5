import dataclasses

import numpy as np
import pytest
from datasets import ClassLabel, Value

from hf_cifar.config.data import DataConfig
from hf_cifar.data.images import decode_cell
from hf_cifar.data.pixels import Pixels
from hf_cifar.data.split import prepare_split
from hf_cifar.data.splits import Splits, load_splits, load_test_split, prepare_splits
from hf_cifar.data.stratify import subsample
from hf_cifar.errors import UserError
from hf_cifar.transforms.preprocessing import Preprocessing

VIEW = Preprocessing((12, 12), None, "bicubic", (0.5,) * 3, (0.5,) * 3)
THREE = ClassLabel(names=["ant", "bee", "cow"])
LABELS = [0] * 50 + [1] * 30 + [2] * 20


def load(folder, **options):
    return load_splits(DataConfig(dataset_name=str(folder), **options))


def counts(split):
    return np.bincount(split.labels, minlength=len(split.id2label)).tolist()


@pytest.fixture
def folder(save, make_rows):
    return save(train=make_rows(LABELS, THREE), test=make_rows([0, 1, 2, 2], THREE))


def test_validation_is_a_stratified_tenth(folder):
    splits = load(folder)
    assert counts(splits.train) == [45, 27, 18]
    assert counts(splits.validation) == [5, 3, 2]
    assert splits.id2label == {0: "ant", 1: "bee", 2: "cow"}


def test_train_and_validation_are_disjoint_and_complete(folder):
    splits = load(folder)
    ids = np.concatenate((splits.train.row_ids, splits.validation.row_ids))
    assert sorted(ids) == list(range(100))
    for split in (splits.train, splits.validation):
        assert (np.diff(split.row_ids) > 0).all()
        assert (split.labels == np.array(LABELS)[split.row_ids]).all()


def test_seed_determines_the_split(folder):
    first = load(folder).validation.row_ids
    assert (load(folder).validation.row_ids == first).all()
    other = load(folder, split_seed=7)
    assert not np.array_equal(other.validation.row_ids, first)
    assert counts(other.validation) == [5, 3, 2]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.98])
@pytest.mark.parametrize("labels", [[0] * 97 + [1] * 2 + [2] * 2, LABELS, [0, 0, 1, 1, 2, 2]])
def test_every_class_is_in_both_parts(save, make_rows, share, labels):
    splits = load(save(train=make_rows(labels, THREE, sizes=((1, 1),))), train_val_split=share)
    assert min(counts(splits.train)) >= 1
    assert min(counts(splits.validation)) >= 1
    assert np.add(counts(splits.train), counts(splits.validation)).tolist() == [
        labels.count(i) for i in range(3)
    ]


def test_existing_validation_split_is_used_whole(save, make_rows):
    splits = load(save(train=make_rows([0, 1, 1]), validation=make_rows([1, 0, 0, 1])))
    assert splits.train.row_ids.tolist() == [0, 1, 2]
    assert splits.validation.row_ids.tolist() == [0, 1, 2, 3]
    assert splits.validation.source_split == "validation"
    assert splits.validation.labels.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("name", ["valid", "val", "dev", "eval"])
def test_validation_split_by_another_name(save, make_rows, name):
    splits = load(save(train=make_rows([0, 1, 1]), **{name: make_rows([1, 0])}))
    assert splits.validation.source_split == name
    assert len(splits.train) == 3


def test_splits_never_contain_test(save, make_rows):
    train, test = make_rows([0, 1] * 20), make_rows([0, 1, 1])
    splits = load(save(train=train, test=test))
    assert [field.name for field in dataclasses.fields(Splits)] == ["train", "validation"]
    assert {splits.train.source_split, splits.validation.source_split} == {"train"}
    sealed = {np.asarray(image).tobytes() for image in test["img"]}
    seen = {image.tobytes() for s in (splits.train, splits.validation) for image in s.pictures("")}
    assert len(seen) == 40
    assert not sealed & seen


def test_one_function_reads_test(folder, make_rows):
    test = load_test_split(DataConfig(dataset_name=str(folder)))
    assert (test.name, test.source_split) == ("test", "test")
    assert test.labels.tolist() == [0, 1, 2, 2]
    expected = [np.asarray(image) for image in make_rows([0, 1, 2, 2], THREE)["img"]]
    assert (np.asarray(test.pictures("")) == np.stack(expected)).all()


@pytest.mark.parametrize("only", ["test", "validation", "val"])
def test_single_test_or_validation_split_is_not_trained_on(save, make_rows, only):
    with pytest.raises(UserError, match=rf"no train split among \['{only}'\]"):
        load(save(**{only: make_rows([0, 1] * 5)}))


def test_single_split_of_another_name_is_train(save, make_rows):
    splits = load(save(everything=make_rows([0, 1] * 5)))
    assert splits.train.source_split == "everything"
    assert len(splits.validation) == 2


def test_two_splits_without_train_are_refused(save, make_rows):
    with pytest.raises(UserError, match=r"no train split among \['a', 'b'\]"):
        load(save(a=make_rows([0, 1]), b=make_rows([0, 1])))


def test_rows_keep_their_pixels(folder, make_rows):
    pictures = [np.asarray(image) for image in make_rows(LABELS, THREE)["img"]]
    splits = load(folder, max_train_samples=20)
    for split in (splits.train, splits.validation):
        found = split.pictures("reading")
        assert found.dtype == np.uint8
        for position, row in enumerate(split.row_ids):
            assert (found[position] == pictures[row]).all()
            assert (split.decode(position) == pictures[row]).all()
            assert (decode_cell(split.rows[position]["image"]) == pictures[row]).all()


def test_samples_are_limited_in_proportion(folder):
    splits = load(folder, max_train_samples=20, max_eval_samples=5)
    assert counts(splits.train) == [10, 6, 4]
    assert len(splits.validation) == 5
    assert min(counts(splits.validation)) >= 1
    whole = load(folder)
    assert set(splits.train.row_ids) < set(whole.train.row_ids)
    assert set(splits.validation.row_ids) < set(whole.validation.row_ids)
    assert (np.diff(splits.train.row_ids) > 0).all()


def test_test_samples_are_limited_too(folder):
    test = load_test_split(DataConfig(dataset_name=str(folder), max_eval_samples=3))
    assert counts(test) == [1, 1, 1]


def test_subsamples_keep_rare_classes_and_follow_their_seed(save, make_rows):
    labels = [0] * 300 + [1] * 4 + [2] * 4
    train = load(save(train=make_rows(labels, THREE, sizes=((1, 1),)))).train
    for limit in (3, 4, 10, 57, 200):
        kept = subsample(train, limit, seed=0)
        assert len(kept) == limit
        assert min(counts(kept)) >= 1
        assert (np.array(labels)[kept.row_ids] == kept.labels).all()
    same, other = (subsample(train, 57, seed=s).row_ids for s in (0, 1))
    assert (same == subsample(train, 57, seed=0).row_ids).all()
    assert not np.array_equal(same, other)
    assert subsample(train, len(train), seed=0) is train
    assert subsample(train, None, seed=0) is train


def test_hash_is_stable(folder):
    first = load(folder).hash
    assert load(folder).hash == first
    assert len(first) == 64


def test_hash_changes_with_the_data_and_the_split(save, make_rows):
    train = make_rows(LABELS, THREE, sizes=((1, 1),))
    moved = [0] * 49 + [1] * 31 + [2] * 20
    renamed = ClassLabel(names=["ant", "bee", "dog"])
    first = save(train=train)
    hashes = [
        load(first).hash,
        load(first, split_seed=1).hash,
        load(first, train_val_split=0.2).hash,
        load(first, max_train_samples=30).hash,
        load(first, max_eval_samples=4).hash,
        load(save(train=make_rows(moved, THREE, sizes=((1, 1),)))).hash,
        load(save(train=make_rows(LABELS, renamed, sizes=((1, 1),)))).hash,
        load(save(train=train, validation=train)).hash,
    ]
    assert len(set(hashes)) == len(hashes)


def test_hash_does_not_depend_on_the_location_of_the_data(save, make_rows):
    train = make_rows(LABELS, THREE, sizes=((1, 1),))
    assert load(save(train=train)).hash == load(save(train=train)).hash


@pytest.mark.parametrize("odd", [0, 3, 7])
def test_pictures_keep_their_sizes(save, make_rows, odd):
    sizes = [(8, 8)] * 8
    sizes[odd] = (8, 9)
    rows = make_rows([0, 1] * 4, sizes=sizes)
    train = load(save(train=rows, validation=make_rows([0, 1]))).train
    found = list(train.pictures("reading"))
    assert [image.shape for image in found] == [(*size, 3) for size in sizes]
    for image, expected in zip(found, rows["img"], strict=True):
        assert (image == np.asarray(expected)).all()


def broken(make_rows, row, content=b"no image", **options):
    rows = make_rows([0, 1] * 10, **options)
    rows = rows.cast_column("img", rows.features["img"].__class__(decode=False))
    cells = rows["img"][:]
    cells[row] = content and {"bytes": content, "path": None}
    return type(rows).from_dict({"img": cells, "label": rows["label"][:]}, rows.features)


@pytest.mark.parametrize("row", [0, 7, 19])
def test_broken_image_names_its_row(save, make_rows, row):
    splits = load(save(train=broken(make_rows, row)))
    with pytest.raises(UserError, match=rf"^train row {row}: cannot read image: not a known image"):
        [list(split.pictures("")) for split in (splits.train, splits.validation)]
    holder = next(s for s in (splits.train, splits.validation) if row in s.row_ids)
    with pytest.raises(UserError, match=rf"^train row {row}: cannot read image"):
        holder.decode(list(holder.row_ids).index(row))


def test_empty_cell_names_its_row(save, make_rows):
    splits = load(save(train=make_rows([0, 1] * 5), validation=broken(make_rows, 3, None)))
    with pytest.raises(UserError, match=r"^validation row 3: cannot read image: the cell is empty"):
        list(splits.validation.pictures(""))


def test_few_pictures_wait_to_be_compared(save, make_rows, monkeypatch):
    monkeypatch.setattr("hf_cifar.data.split.num_threads", lambda: 2)
    decoded, decode = [], Pixels.decode
    monkeypatch.setattr(
        Pixels, "decode", lambda self, row: decoded.append(row) or decode(self, row)
    )
    rows = make_rows([0, 1] * 50, sizes=((90, 70), (70, 90)))
    pictures = iter(load(save(train=rows)).train.pictures("comparing"))
    decoded.clear()
    assert next(pictures).shape in ((90, 70, 3), (70, 90, 3))
    pictures.close()
    assert len(decoded) < 10


def test_every_broken_image_is_named(save, make_rows):
    rows = broken(make_rows, 3)
    cells = rows["img"][:]
    for row in (4, 5, 11):
        cells[row] = None
    rows = type(rows).from_dict({"img": cells, "label": rows["label"][:]}, rows.features)
    splits = load(save(train=rows, validation=broken(make_rows, 0)))
    with pytest.raises(
        UserError, match=r"^4 images cannot be read, train rows 3-5, 11; the first: "
    ):
        list(splits.train.pictures(""))
    for kind in ("auto", "streamed"):
        for _ in range(2):
            with pytest.raises(
                UserError,
                match=r"^5 images cannot be read, train rows 3-5, 11, validation rows 0; the first: "
                r"train row 3: cannot read image: not a known image format.*--on_bad_image skip",
            ):
                prepare_splits(splits, VIEW, DataConfig(pixel_store=kind))


@pytest.mark.parametrize("kind", ["auto", "streamed"])
def test_only_unreadable_images_are_skipped(save, make_rows, kind):
    folder = save(train=broken(make_rows, 7), test=broken(make_rows, 2))
    options = {"on_bad_image": "skip", "pixel_store": kind}
    config = DataConfig(dataset_name=str(folder), **options)
    splits = prepare_splits(load_splits(config), VIEW, config)
    parts = (splits.train, splits.validation)
    assert sorted(i for part in parts for i in part.skipped) == [7]
    ids = sorted(np.concatenate([part.row_ids for part in parts]).tolist())
    assert ids == [row for row in range(20) if row != 7]
    whole = load(save(train=make_rows([0, 1] * 10)))
    assert {*splits.validation.row_ids} <= {*whole.validation.row_ids}  # no row changes its split
    assert splits.hash != whole.hash
    for part in parts:
        expected = make_rows([0, 1] * 10)
        for row, image in zip(part.row_ids, part.pictures(""), strict=True):
            assert (image == np.asarray(expected[int(row)]["img"])).all()
    test = prepare_split(load_test_split(config), VIEW, kind=kind, on_bad_image="skip")
    assert (test.skipped.tolist(), len(test)) == ([2], 19)
    assert len(list(test.pictures(""))) == 19


def test_class_without_readable_images_is_refused(save, make_rows):
    rows = make_rows([0] * 18 + [1] * 2)
    rows = rows.cast_column("img", rows.features["img"].__class__(decode=False))
    cells = [*rows["img"][:18], None, None]
    rows = type(rows).from_dict({"img": cells, "label": rows["label"][:]}, rows.features)
    config = DataConfig(on_bad_image="skip")
    splits = load(save(train=rows, validation=make_rows([0, 1])))
    with pytest.raises(UserError, match="class 'dog' has no readable image in train"):
        prepare_splits(splits, VIEW, config)
    splits = load(save(train=make_rows([0, 1] * 4), validation=rows.select([18, 19])))
    with pytest.raises(UserError, match="no image of validation can be read"):
        prepare_splits(splits, VIEW, config)


def test_the_limit_on_pixels_reaches_the_split(save, make_rows):
    folder = save(train=make_rows([0, 1] * 4, sizes=((8, 8), (9, 9))))
    splits = load(folder, max_image_pixels=80)
    with pytest.raises(
        UserError, match=r"4 images cannot be read.* 9 x 9 pixels exceed the limit of 80"
    ):
        prepare_splits(splits, VIEW, DataConfig())
    prepare_splits(load(folder), VIEW, DataConfig())


@pytest.mark.parametrize("other", ["validation", "test"])
def test_class_missing_in_train_is_refused(save, make_rows, other):
    folder = save(train=make_rows([0, 2] * 5, THREE), **{other: make_rows([0, 1], THREE)})
    with pytest.raises(
        UserError, match=f"{other} row 1: label 'bee' is not one of the 2 classes .* train; add"
    ):
        load(folder)


def test_classes_without_images_are_left_out_and_renumbered(save, make_rows, caplog):
    folder = save(train=make_rows([2, 0, 2] * 5, THREE), test=make_rows([2, 2, 0], THREE))
    splits = load(folder)
    assert splits.id2label == {0: "ant", 1: "cow"}
    assert "1 of 3 classes have no images and are left out: bee" in caplog.text
    assert counts(splits.train) == [4, 9] and counts(splits.validation) == [1, 1]
    test = load_test_split(DataConfig(dataset_name=str(folder)))
    assert (test.id2label, test.labels.tolist()) == (splits.id2label, [1, 1, 0])


def test_classes_are_matched_by_name(save, make_rows):
    turned = ClassLabel(names=["cow", "dog", "ant", "bee"])  # no image of a dog
    folder = save(
        train=make_rows([0, 1, 2] * 5, THREE),
        validation=make_rows([2, 0, 3], turned),
        test=make_rows(["cow", "ant"], Value("string")),
    )
    splits = load(folder)
    assert splits.id2label == {0: "ant", 1: "bee", 2: "cow"}
    assert splits.validation.labels.tolist() == [0, 2, 1]
    assert load_test_split(DataConfig(dataset_name=str(folder))).labels.tolist() == [2, 0]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.9])
def test_classes_with_one_image_stay_in_train(save, make_rows, caplog, share):
    splits = load(save(train=make_rows([0] * 9 + [1, 2], THREE)), train_val_split=share)
    assert counts(splits.train)[1:] == [1, 1] and counts(splits.validation)[1:] == [0, 0]
    assert len(splits.train) + len(splits.validation) == 11 and len(splits.validation) > 0
    assert "2 of 3 classes have one image, which is in train, so validation" in caplog.text


def test_one_image_of_each_class_cannot_be_split(save, make_rows):
    with pytest.raises(UserError, match="'cat' has one image in train, and no class has more"):
        load(save(train=make_rows([0, 1])))
    own = load(save(train=make_rows([0] * 9 + [1]), validation=make_rows([0, 1])))
    assert counts(own.train) == [9, 1]


def test_single_class_is_refused(save, make_rows):
    with pytest.raises(UserError, match="has 1 class; a classifier needs at least two"):
        load(save(train=make_rows(["a"] * 9, Value("string"))), label_column_name="label")


@pytest.mark.parametrize("flag", ["max_train_samples", "max_eval_samples"])
def test_limit_below_the_number_of_classes_is_refused(folder, flag):
    with pytest.raises(UserError, match=f"--{flag} 2 is less than the 3 classes"):
        load(folder, **{flag: 2})


def test_missing_test_split_is_refused(save, make_rows):
    data = DataConfig(dataset_name=str(save(train=make_rows([0, 1] * 5))))
    with pytest.raises(UserError, match=r"no labelled test split, only \['train'\]; add one"):
        load_test_split(data)
