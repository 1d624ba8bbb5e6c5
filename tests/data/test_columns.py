"""hf_cifar.data.columns: label columns of lists, from every source to train and validation."""

import json

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, LargeList, List, Value
from PIL import Image

from hf_cifar.config.data import DataConfig
from hf_cifar.data.sources import load_source
from hf_cifar.data.splits import load_splits, load_test_split
from hf_cifar.errors import UserError

TAGS = ClassLabel(names=["cat", "dog", "owl"])
LISTS = [[0], [1, 2], [], [0, 1], [2, 2], [1], [0, 2], []]


def config(folder, **options):
    return DataConfig(dataset_name=str(folder), **options)


@pytest.mark.parametrize("kind", [List, LargeList, lambda f: List(f, length=2)])
def test_a_column_of_lists_is_found_by_its_type(save, make_rows, kind):
    lists = [[0, 1], [1, 2], [0, 2], [2, 2]] * 2
    rows = make_rows(lists, kind(TAGS), label="tags")
    splits = load_splits(config(save(train=rows, validation=rows)))
    assert splits.multi_label and splits.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert splits.train.labels.dtype == np.uint8
    wanted = [[1, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 1]] * 2
    np.testing.assert_array_equal(splits.validation.labels, wanted)


def test_column_of_single_class_labels_takes_priority_over_lists(save, make_rows):
    rows = make_rows([0, 1] * 4, label="kind")
    rows = rows.add_column("tags", LISTS, feature=List(TAGS))
    folder = save(train=rows, validation=rows)
    assert not load_splits(config(folder)).multi_label
    assert load_splits(config(folder, label_column_name="tags")).multi_label


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_lists_of_strings_are_selected_by_flag(save, make_rows, kind):
    words = [[TAGS.names[i] for i in row] for row in LISTS]
    train = make_rows(words, List(Value(kind)), label="tags")
    folder = save(train=train, test=train.select([1, 0]))
    with pytest.raises(UserError, match=r"pass --label_column_name"):
        load_source(config(folder))
    source = load_source(config(folder, label_column_name="tags"))
    assert source["train"].features["label"] == List(TAGS)
    assert source["train"]["label"][:] == LISTS
    assert source["test"]["label"][:] == [LISTS[1], LISTS[0]]


def test_tags_of_an_image_folder(tmp_path):
    lines = []
    for i, row in enumerate(LISTS):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "tags": [TAGS.names[k] for k in row]}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = load_source(config(tmp_path, label_column_name="tags"))
    assert source["train"].features["label"] == List(TAGS)
    assert sorted(source["train"]["label"][:]) == sorted(LISTS)


@pytest.mark.parametrize(
    ("lists", "feature", "message"),
    [
        ([[0], [1], None, [2]], List(TAGS), "train row 2: .*missing.* an empty list"),
        ([[0], [1], [2, None]], List(TAGS), "train row 2: a label is missing"),
        ([[0, 1, 1], [1, 0, 0]], List(Value("int64")), r"label column is List\(Value.*: cast it to List"),
        ([[0.5], [1.0]], List(Value("float32")), r"label column is List\(Value.*lists of class labels"),
        ([[[0]], [[1]]], List(List(TAGS)), r"label column is List\(List.*lists of class labels"),
    ],
)  # fmt: skip
def test_invalid_label_lists_are_refused(save, make_rows, lists, feature, message):
    folder = save(train=make_rows(lists, feature, label="tags"))
    with pytest.raises(UserError, match=message):
        load_source(config(folder, label_column_name="tags"))


@pytest.mark.parametrize("wrong", [7, -1])
def test_a_label_out_of_range_is_named_with_its_row(tmp_path, make_rows, wrong):
    rows = make_rows([[0, 1], [2], [], [1, wrong]], List(Value("int64")), label="tags")
    rows.info.features = rows._info.features = datasets.Features(
        {"img": datasets.Image(), "tags": List(TAGS)}
    )
    rows.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=f"train row 3: label {wrong} is not one of the 3 classes"):
        load_source(config(tmp_path / "saved"))


def test_tag_missing_in_train_is_named(save, make_rows):
    folder = save(
        train=make_rows([["cat"], ["dog", "cat"]], List(Value("string"))),
        test=make_rows([["dog"], ["cat", "owl"]], List(Value("string"))),
    )
    with pytest.raises(UserError, match=r"test row 1: label 'owl' is not one of the 2 classes"):
        load_source(config(folder, label_column_name="label"))


@pytest.mark.parametrize(
    ("feature", "labels"), [(List(ClassLabel(names=["a", "b"])), [[0], [1]]), (TAGS, [0, 1])]
)
def test_splits_with_different_classes_are_refused(save, make_rows, feature, labels):
    folder = save(train=make_rows(LISTS, List(TAGS)), test=make_rows(labels, feature))
    with pytest.raises(
        UserError, match=r"test row 0: label 'a' is not one of the 3|split test are"
    ):
        load_source(config(folder))


@pytest.mark.parametrize("hidden", [[[], []], [[-1], [-1]], [None, None]])
def test_hidden_test_labels_are_left_out(save, make_rows, hidden):
    folder = save(train=make_rows(LISTS, List(TAGS)), test=make_rows(hidden, List(TAGS)))
    assert list(load_source(config(folder))) == ["train"]
    with pytest.raises(UserError, match="no labelled test split"):
        load_test_split(config(folder))


def test_a_stream_of_lists_is_refused(tmp_path, make_rows):
    make_rows(LISTS, List(TAGS)).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(UserError, match=r"column 'label' .*multiple labels.*leave out --streaming"):
        load_splits(config(tmp_path, streaming=True, max_eval_samples=4))


def test_hash_depends_on_the_labels(save, make_rows):
    other = [*LISTS[:-1], [1]]
    one, two = (save(train=make_rows(lists, List(TAGS))) for lists in (LISTS, other))
    assert load_splits(config(one)).hash != load_splits(config(two)).hash


def test_a_class_with_one_image_stays_in_train(save, make_rows):
    folder = save(train=make_rows([[0], [1], [0, 2], [0], [1], [0, 1]], List(TAGS)))
    splits = load_splits(config(folder))
    assert splits.train.labels[:, 2].sum() == 1 and splits.validation.labels[:, 2].sum() == 0


def test_a_class_without_images_is_left_out_of_lists_too(save, make_rows, caplog):
    lists = [[0, 2], [2], [0], []] * 3
    folder = save(train=make_rows(lists, List(TAGS)), test=make_rows([[2], []], List(TAGS)))
    splits = load_splits(config(folder))
    assert splits.id2label == {0: "cat", 1: "owl"}
    assert "1 of 3 classes have no images and are left out: dog" in caplog.text
    np.testing.assert_array_equal(load_test_split(config(folder)).labels, [[0, 1], [0, 0]])


def test_data_set_with_one_image_is_refused(save, make_rows):
    folder = save(train=make_rows([[0, 1, 2]], List(TAGS)))
    with pytest.raises(UserError, match="has one image in train"):
        load_splits(config(folder))


def test_selected_rows_keep_their_labels(make_rows):
    from hf_cifar.data.labels import label_array

    rows: Dataset = make_rows(LISTS, List(TAGS)).select([3, 1])
    np.testing.assert_array_equal(label_array(rows), [[1, 1, 0], [0, 1, 1]])
