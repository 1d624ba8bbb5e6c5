"""Folds and groups: --num_folds, --fold and --group_column_name."""

import csv
import logging

import numpy as np
import pytest
from datasets import ClassLabel, DatasetDict
from PIL import Image

from hf_cifar.config.data import DataConfig
from hf_cifar.data.splits import DataSource, load_splits
from hf_cifar.errors import UserError

TWO = ClassLabel(names=["ant", "bee"])
LABELS = [0] * 30 + [1] * 20
PATIENTS = [f"p{row // 5}" for row in range(50)]


@pytest.fixture
def folder(save, make_rows):
    return save(train=make_rows(LABELS, TWO), test=make_rows([0, 1], TWO))


@pytest.fixture
def scans(tmp_path):
    """Images with a table of label and patient, two of whom have no name."""
    with (tmp_path / "scans.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "patient", "label"])
        for row, (label, patient) in enumerate(zip(LABELS, PATIENTS, strict=True)):
            Image.new("RGB", (8, 8), (row, 0, 0)).save(tmp_path / f"{row}.png")
            rows.writerow([f"{row}.png", "" if row in (0, 1) else patient, TWO.names[label]])
    return tmp_path


def load(data, **options):
    return load_splits(DataConfig(dataset_name=data, **options))


def groups_of(split):
    return set(split.rows["group"])


def test_folds_are_disjoint_and_complete(folder):
    folds = [load(str(folder), num_folds=3, fold=fold) for fold in (1, 2, 3)]
    held_out = [splits.validation.row_ids for splits in folds]
    assert sorted(np.concatenate(held_out)) == list(range(50))
    for splits in folds:
        assert sorted([*splits.train.row_ids, *splits.validation.row_ids]) == list(range(50))
        assert np.bincount(splits.validation.labels).tolist() in ([10, 7], [10, 6])
    assert len({splits.hash for splits in folds}) == 3


def test_views_of_a_source_share_their_images(folder):
    config = DataConfig(dataset_name=str(folder), num_folds=2, fold=1)
    source = DataSource(config)
    other = source.sharing(DataConfig(dataset_name=str(folder), num_folds=2, fold=2))
    assert source.splits.validation.pixels is other.splits.train.pixels
    assert sorted([*source.splits.validation.row_ids, *other.splits.validation.row_ids]) == list(
        range(50)
    )


@pytest.mark.parametrize("options", [{}, {"num_folds": 4, "fold": 2}])
def test_a_group_is_never_divided(scans, options, caplog):
    caplog.set_level(logging.INFO)
    splits = load(str(scans), group_column_name="patient", **options)
    first, second = groups_of(splits.train), groups_of(splits.validation)
    assert not (first & second) - {""} and first | second == {*PATIENTS, ""}
    assert (
        "2 of 50 images have no value in column 'patient'; each of them is a group of its own"
        in (caplog.text)
    )
    size = len(splits.validation)
    # Ten patients, of whom one has three named images, and two images alone.
    assert f"of 12 groups of column 'patient', {size} of 50 images" in caplog.text
    assert 4 <= size <= 14


def test_groups_of_a_data_set_in_memory_and_of_numbers(make_rows):
    rows = make_rows(LABELS, TWO).add_column("camera", [row % 4 for row in range(50)])
    splits = load(DatasetDict(train=rows), group_column_name="camera", num_folds=2, fold=1)
    assert not groups_of(splits.train) & groups_of(splits.validation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": 1}, "--fold is 1, but --num_folds is not given"),
        ({"num_folds": 3, "fold": 4}, "--fold is 4, but there are 3"),
        ({"num_folds": 1, "fold": 1}, "--num_folds is 1; it must be at least 2"),
        ({"num_folds": 3}, "--num_folds 3 needs --fold, .* from 1 to 3"),
        ({"num_folds": 51, "fold": 1}, "train has 50 images, too few for 51 folds"),
        ({"group_column_name": "patient"}, "no column 'patient' in .*pass --group_column_name"),
        ({"streaming": True, "num_folds": 2, "fold": 1}, "--num_folds needs every row"),
        ({"streaming": True, "group_column_name": "x"}, "--group_column_name needs every row"),
    ],
)
def test_what_cannot_be_divided_is_refused(folder, options, message):
    with pytest.raises(UserError, match=message):
        load(str(folder), **options)


def test_a_missing_group_column_of_a_table_is_named(scans):
    with pytest.raises(UserError, match=r"no column 'patients' in scans\.csv.*nearest: patient"):
        load(str(scans), group_column_name="patients")
    with pytest.raises(UserError, match=r"train has 12 groups in .*, too few for 20 folds"):
        load(str(scans), group_column_name="patient", num_folds=20, fold=1)


def test_an_own_validation_split_takes_no_part_in_folds(save, make_rows, caplog):
    data = save(train=make_rows(LABELS, TWO), validation=make_rows([0, 1], TWO))
    splits = load(str(data), num_folds=2, fold=1)
    assert len(splits.validation) == 25
    assert "the data set's own validation split is not used" in caplog.text
