"""hf_cifar.data.pixel_tables: the pixels of an image in each row of a CSV file."""

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from hf_cifar.config.data import DataConfig
from hf_cifar.data.images import decode_cell
from hf_cifar.data.sources import load_source, read_source
from hf_cifar.errors import UserError

NAMED = [f"pixel{i}" for i in range(64)]
PLACES = [f"{y}x{x}" for y in range(1, 9) for x in range(1, 9)]


def pixels(i):
    return np.random.default_rng(i).integers(0, 256, (8, 8))


def write(path, header, rows):
    lines = [header] if header else []
    path.write_text("\n".join([*lines, *rows]) + "\n")
    return path


def row(i, *cells):
    return ",".join(map(str, [*cells, *pixels(i).ravel()]))


def check(rows, numbers):
    """Check that row k shows image numbers[k] and has its number's remainder as label."""
    names = rows.features["label"].names
    for i, cell, label in zip(numbers, rows["image"][:], rows["label"][:], strict=True):
        assert (decode_cell(cell)[..., 0] == pixels(i)).all() and names[label] == str(i % 3)


@pytest.mark.parametrize("header", [["label", *NAMED], ["digit", *PLACES], []])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_column_for_each_pixel(tmp_path, header, as_file):
    path = write(tmp_path / "train.csv", ",".join(header), [row(i, i % 3) for i in range(9)])
    splits = load_source(DataConfig(dataset_name=str(path if as_file else tmp_path)))
    assert list(splits) == ["train"]
    check(splits["train"], range(9))


def test_parquet(tmp_path):
    columns = {name: [int(pixels(i).flat[k]) for i in range(9)] for k, name in enumerate(NAMED)}
    table = pyarrow.table({"digit": [i % 3 for i in range(9)], **columns})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    for name in (tmp_path, tmp_path / "train.parquet"):
        check(load_source(DataConfig(dataset_name=str(name)))["train"], range(9))


def test_competition_layout(tmp_path):
    """Train has labels and test has none, as in the digit recognizer."""
    write(tmp_path / "train.csv", ",".join(["label", *NAMED]), [row(i, i % 3) for i in range(9)])
    write(tmp_path / "test.csv", ",".join(NAMED), [row(i) for i in range(4)])
    write(tmp_path / "sample_submission.csv", "ImageId,Label", ["1,0", "2,0"])
    result = read_source(DataConfig(dataset_name=str(tmp_path)))
    assert list(result.splits) == ["train"]
    check(result.splits["train"], range(9))
    assert result.description == (
        f"{tmp_path.name}: the pixels of 13 images in test.csv, train.csv; left out: 1 file (1 .csv)"
    )


@pytest.mark.parametrize("separator", [" ", ", "])
def test_pixels_as_text_and_a_column_of_splits(tmp_path, separator):
    rows = [
        f'{i % 3},"{separator.join(map(str, pixels(i).ravel()))}",{"Test" if i > 5 else "Training"}'
        for i in range(9)
    ]
    path = write(tmp_path / "faces.csv", "emotion,pixels,Usage", rows)
    splits = load_source(DataConfig(dataset_name=str(path)))
    check(splits["train"], range(6))
    check(splits["test"], range(6, 9))
    path.write_text(path.read_text().replace("Test", "PrivateTest"))
    splits = load_source(DataConfig(dataset_name=str(path)))
    assert {split: len(found) for split, found in splits.items()} == {"train": 6, "test": 3}
    path.write_text(path.read_text().replace("PrivateTest", "Other"))
    with pytest.raises(
        UserError, match=r"'Usage' of faces.csv are not all names of splits: 'Other',"
    ):
        load_source(DataConfig(dataset_name=str(path)))


def test_multiple_tables_of_pixels(tmp_path):
    for name in ("one.csv", "two.csv"):
        write(tmp_path / name, ",".join(["label", *NAMED]), [row(i, i % 3) for i in range(9)])
    with pytest.raises(UserError, match=r"one.csv, two.csv; name them train.csv and test.csv"):
        load_source(DataConfig(dataset_name=str(tmp_path)))


def test_a_row_that_is_damaged(tmp_path):
    path = write(tmp_path / "train.csv", ",".join(["label", *NAMED]), [row(0, 0), row(1, 1), "2,x"])
    with pytest.raises(UserError, match=r"train.csv cannot be read as a table of pixels: .*fix it"):
        load_source(DataConfig(dataset_name=str(path)))


def test_other_tables_hold_no_pixels(tmp_path):
    """Such as 63 measurements, which make no square."""
    path = write(tmp_path / "a.csv", ",".join(["label", *NAMED[1:]]), [row(0), row(1)])
    with pytest.raises(UserError, match=r"no column of a.csv names images"):
        load_source(DataConfig(dataset_name=str(path)))


def test_a_table_of_empty_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("\n\n\n")
    for name in (path, tmp_path):
        with pytest.raises(UserError):
            load_source(DataConfig(dataset_name=str(name)))
