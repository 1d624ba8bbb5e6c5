import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from hf_cifar.config.data import DataConfig
from hf_cifar.data.images import decode_cell
from hf_cifar.data.labels import class_label
from hf_cifar.data.sources import load_source, open_data_set, read_source
from hf_cifar.data.splits import load_splits, load_test_split
from hf_cifar.errors import UserError
from hf_cifar.hub.reach import looks_like_path

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: test
    path: data/test-*
---
# Cats and dogs
"""


def source(folder, **options):
    return load_source(DataConfig(dataset_name=str(folder), **options))


def pixels(rows):
    return [decode_cell(cell) for cell in rows["image"][:]]


def write_hub_layout(folder, **splits):
    (folder / "data").mkdir(parents=True)
    for name, rows in splits.items():
        rows.to_parquet(str(folder / "data" / f"{name}-00000-of-00001.parquet"))
    (folder / "README.md").write_text(CARD)
    return folder


def write_image_folder(folder, *splits, per_class=4):
    generator = np.random.default_rng(0)
    for split in splits or [""]:
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(per_class):
                noise = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / split / name / f"{i}.png")
    return folder


def check_standard(loaded, reference):
    """Check for standard columns, the same labels and, after decoding, the same pixels."""
    for name, rows in reference.items():
        assert loaded[name].column_names == ["image", "label"]
        assert loaded[name].features["image"] == ImageFeature(decode=False)
        assert loaded[name].features["label"].names == ["cat", "dog"]
        assert loaded[name]["label"][:] == rows["label"][:]
        for found, expected in zip(pixels(loaded[name]), rows["img"], strict=True):
            assert (found == np.asarray(expected)).all()


def test_hub_layout(tmp_path, make_rows):
    splits = {"train": make_rows([0, 1, 1]), "test": make_rows([1, 0])}
    check_standard(source(write_hub_layout(tmp_path / "hub", **splits)), splits)


def test_saved_dataset_dict(save, make_rows):
    splits = {"test": make_rows([1, 0]), "train": make_rows([0, 1, 1])}
    loaded = source(save(**splits))
    check_standard(loaded, splits)
    assert next(iter(loaded)) == "train"


def test_saved_dataset_is_train(tmp_path, make_rows):
    rows = make_rows([0, 1, 1])
    rows.save_to_disk(str(tmp_path / "rows"))
    check_standard(source(tmp_path / "rows"), {"train": rows})


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        ([], ["train"]),
        (["train", "test"], ["train", "test"]),
        (["train", "validation", "test"], ["train", "validation", "test"]),
        (["train", "val"], ["train", "validation"]),
    ],
)
def test_image_folder(tmp_path, folders, splits):
    root = write_image_folder(tmp_path / "images", *folders)
    loaded = source(root)
    assert list(loaded) == splits
    for folder, split in zip(folders or [""], splits, strict=True):
        assert loaded[split].features["label"].names == ["cat", "dog"]
        assert sorted(loaded[split]["label"][:]) == [0] * 4 + [1] * 4
        files = {
            (np.asarray(Image.open(path)).tobytes(), path.parent.name)
            for path in (root / folder).rglob("*.png")
        }
        names = [["cat", "dog"][label] for label in loaded[split]["label"][:]]
        assert files == {
            (found.tobytes(), name)
            for found, name in zip(pixels(loaded[split]), names, strict=True)
        }


def test_bundled_digits():
    loaded = source("bundled/digits")
    assert (len(loaded["train"]), len(loaded["test"])) == (1442, 355)
    assert loaded["train"].features["label"].names == [str(digit) for digit in range(10)]
    first = pixels(loaded["train"].select([0]))[0]
    assert first.shape == (8, 8, 3)
    assert first.max() > 200
    every_class = np.bincount(loaded["test"]["label"][:])
    assert every_class.min() >= 34


def test_bundled_digits_agree_with_scikit_learn():
    from sklearn.datasets import load_digits

    digits = load_digits()
    loaded = source("bundled/digits")
    found = {
        (image[..., 0].tobytes(), label)
        for rows in loaded.values()
        for image, label in zip(pixels(rows), rows["label"][:], strict=True)
    }
    grey = (digits.images * 255 / 16).round().astype(np.uint8)
    assert found == {(g.tobytes(), t) for g, t in zip(grey, digits.target, strict=True)}


def test_columns_with_swapped_names(save):
    noise = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    features = Features({"label": ImageFeature(), "image": ClassLabel(names=["a", "b"])})
    rows = Dataset.from_dict({"label": [noise] * 2, "image": [1, 0]}, features=features)
    loaded = source(save(train=rows))
    assert loaded["train"]["label"][:] == [1, 0]
    assert pixels(loaded["train"])[0].shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("labels", "feature", "names", "ids"),
    [
        (["dog", "cat", "dog"], Value("string"), ["cat", "dog"], [1, 0, 1]),
        (["dog", "cat", "dog"], Value("large_string"), ["cat", "dog"], [1, 0, 1]),
        ([10, 2, 10], Value("int64"), ["2", "10"], [1, 0, 1]),
        ([7, 0, 7], Value("uint8"), ["0", "7"], [1, 0, 1]),
        ([True, False, True], Value("bool"), ["False", "True"], [1, 0, 1]),
    ],
)
def test_string_and_integer_labels_by_flag(save, make_rows, labels, feature, names, ids):
    folder = save(train=make_rows(labels, feature, label="kind"))
    with pytest.raises(UserError, match="is a class label column; pass --label_column_name"):
        source(folder)
    loaded = source(folder, label_column_name="kind")
    assert loaded["train"].features["label"].names == names
    assert loaded["train"]["label"][:] == ids


def test_class_names_come_from_train_whatever_the_order(save, make_rows):
    folder = save(
        test=make_rows(["dog", "dog"], Value("string")),
        train=make_rows(["dog", "cat", "ant"], Value("string")),
    )
    loaded = source(folder, label_column_name="label")
    assert loaded["test"].features["label"].names == ["ant", "cat", "dog"]
    assert loaded["test"]["label"][:] == [2, 2]


def test_two_label_columns_are_listed(save, make_rows):
    rows = make_rows([0, 1, 1], label="fine_label")
    rows = rows.add_column("coarse_label", [0, 0, 0]).cast_column(
        "coarse_label", ClassLabel(names=["animal"])
    )
    folder = save(train=rows)
    with pytest.raises(UserError) as raised:
        source(folder)
    assert "['fine_label', 'coarse_label']" in str(raised.value)
    assert "--label_column_name" in str(raised.value)
    assert source(folder, label_column_name="fine_label")["train"]["label"][:] == [0, 1, 1]


def test_two_image_columns_are_listed(save, make_rows):
    rows = make_rows([0, 1])
    masks = make_rows([0, 1], image="mask").remove_columns("label")
    rows = rows.rename_column("img", "scan")
    folder = save(train=concatenate_datasets([rows, masks], axis=1))
    with pytest.raises(
        UserError, match=r"multiple image columns: \['scan', 'mask'\]; .*--image_col"
    ):
        source(folder)
    assert "image" in source(folder, image_column_name="mask")["train"].column_names


def test_missing_image_column_is_refused(save):
    folder = save(train=Dataset.from_dict({"text": ["a"], "label": [0]}))
    with pytest.raises(UserError, match=r"text, label is an image column; .*--image_column"):
        source(folder)
    with pytest.raises(UserError, match=r"column 'text' holds .*, not images"):
        source(folder, image_column_name="text")


def test_missing_requested_column_is_refused(save, make_rows):
    folder = save(train=make_rows([0, 1]))
    with pytest.raises(UserError, match=r"no column 'kind' in \['img', 'label'\]"):
        source(folder, label_column_name="kind")


def test_images_without_class_folders(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="one folder per class"):
        source(tmp_path)


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, None, 1], None, "train row 1: label None is not one of the 2 classes"),
        ([0, 1, -1], None, "train row 2: label -1 is not one of the 2 classes"),
        (["a", None], Value("string"), "train row 1: the label is missing"),
        ([3, None], Value("int64"), "train row 1: the label is missing"),
        ([1.0, 2.0, float("nan")], Value("float64"), "train row 2: the label is missing"),
        (["a", " "], Value("string"), "train row 1: the label is missing"),
        (["a", "b", "a "], Value("string"), "labels 'a' and 'a ' differ only in white space"),
        ([4, 3, -1], Value("int64"), "train row 2: label -1 is negative"),
        ([1.0, 2.5], Value("float32"), "train row 1: label 2.5 is not a whole number"),
        ([[0], [1]], List(Value("int64")), "List.* it must be class labels, strings or integers"),
    ],
)
def test_bad_labels_are_named_by_row(save, make_rows, labels, feature, message):
    folder = save(train=make_rows(labels, feature))
    with pytest.raises(UserError, match=message):
        source(folder, label_column_name="label")


@pytest.mark.parametrize("name", ["label", "Labels", "CLASS", "Target", "category"])
@pytest.mark.parametrize(
    ("labels", "feature", "names"),
    [
        ([True, False], Value("bool"), ["False", "True"]),
        ([2.0, 10.0], Value("float32"), ["2", "10"]),
        ([2, 10], Value("int16"), ["2", "10"]),
        (["b", "a"], Value("string"), ["a", "b"]),
        ([["b"], ["a", "b"]], List(Value("string")), ["a", "b"]),
    ],
)
def test_an_obvious_name_makes_a_label_column(
    save, make_rows, caplog, name, labels, feature, names
):
    caplog.set_level("INFO")
    rows = make_rows(labels, feature, label=name).add_column("weight", [0.5, 1.5])
    found = source(save(train=rows))["train"].features["label"]
    assert class_label(found).names == names
    assert f"label column: '{name}', by its name; --label_column_name chooses" in caplog.text


def test_an_obvious_name_decides_between_label_columns(save, make_rows, caplog):
    caplog.set_level("INFO")
    rows = make_rows([0, 1, 1], label="quality").add_column(
        "category", [1, 0, 0], feature=ClassLabel(names=["x", "y"])
    )
    folder = save(train=rows)
    assert source(folder)["train"]["label"][:] == [1, 0, 0]
    assert "label column: 'category', by its name; --label_column_name chooses an" in caplog.text
    assert source(folder, label_column_name="quality")["train"]["label"][:] == [0, 1, 1]


@pytest.mark.parametrize(
    ("first", "second"), [("label", "class"), ("labels", "Target"), ("quality", "label")]
)
def test_two_columns_that_could_be_labels_are_listed(save, make_rows, first, second):
    # Of two types: an undeclared column that is called label is a candidate too.
    rows = make_rows([0, 1, 1], label=first)
    if first != "quality":
        rows = rows.cast_column(first, Value("int64"))
    folder = save(train=rows.add_column(second, ["a", "b", "c"]))
    with pytest.raises(UserError, match=rf"multiple label columns: \['{first}', '{second}'\]"):
        source(folder)


def test_declared_classes_with_an_obvious_name_are_the_labels(save, make_rows):
    rows = make_rows([0, 1, 1], label="label").add_column("class", ["a", "b", "c"])
    assert source(save(train=rows))["train"].features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize("name", ["image", "Image", "img", "picture", "photo"])
def test_an_obvious_name_decides_between_image_columns(save, make_rows, caplog, name):
    caplog.set_level("INFO")
    rows = make_rows([0, 1], image=name, sizes=((4, 6),))
    masks = make_rows([0, 1], image="mask").remove_columns("label")
    loaded = source(save(train=concatenate_datasets([masks, rows], axis=1)))
    assert pixels(loaded["train"])[0].shape == (4, 6, 3)
    assert f"image column: '{name}', by its name; --image_column_name chooses an" in caplog.text


@pytest.mark.parametrize("split", ["train", "test"])
def test_label_outside_the_names(tmp_path, make_rows, split):
    splits = {"train": make_rows([0, 1, 0]), "test": make_rows([1, 0, 1])}
    folder = write_hub_layout(tmp_path / "hub", **splits)
    file = folder / "data" / f"{split}-00000-of-00001.parquet"
    table = pq.read_table(file)
    column = table.schema.get_field_index("label")
    table = table.set_column(column, table.schema.field(column), pa.array([0, 7, 1]))
    pq.write_table(table, file)
    with pytest.raises(UserError, match=f"{split} row 1: label 7 is not one of the 2 classes"):
        source(folder)


def test_label_missing_in_train_is_named(save, make_rows):
    folder = save(
        train=make_rows(["a", "b"], Value("string")), test=make_rows(["a", "c"], Value("string"))
    )
    with pytest.raises(UserError, match="test row 1: label 'c' is not one of the 2 classes"):
        source(folder, label_column_name="label")


def test_integers_are_refused_if_train_has_strings(save, make_rows):
    folder = save(
        train=make_rows(["a", "b"], Value("string")), test=make_rows([0, 1], Value("int64"))
    )
    with pytest.raises(UserError, match="test row 0: label 0 is not one of the 2 classes"):
        source(folder, label_column_name="label")


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_with_different_classes_are_refused(tmp_path, make_rows, streaming):
    folder = tmp_path / "data"
    folder.mkdir()
    make_rows([0, 1] * 5).to_parquet(str(folder / "train.parquet"))
    other = make_rows([0, 1], ClassLabel(names=["dog", "cat"]))
    other.to_parquet(str(folder / "test.parquet"))
    with pytest.raises(UserError, match=r"test\.parquet has the classes \['dog', 'cat'\], but the"):
        open_data_set(DataConfig(dataset_name=str(folder)), streaming)


def test_splits_with_other_classes_are_refused(save, make_rows):
    other = make_rows([0, 1, 2], ClassLabel(names=["dog", "owl", "rat"]))
    with pytest.raises(
        UserError, match=r"test row 1: label 'owl' .*\(2 such classes: 'owl', 'rat'\)"
    ):
        source(save(train=make_rows([0, 1]), test=other))


def test_split_without_the_columns_is_refused():
    from hf_cifar.data.columns import standard_columns

    noise = [Image.new("RGB", (4, 4))] * 2
    rows = Dataset.from_dict(
        {"img": noise, "label": [0, 1]},
        features=Features({"img": ImageFeature(), "label": ClassLabel(names=["a", "b"])}),
    )
    splits = DatasetDict(train=rows, test=rows.rename_column("img", "scan"))
    with pytest.raises(UserError, match=r"test has columns \['scan', 'label'\], not img and label"):
        standard_columns(splits, DataConfig())
    splits = DatasetDict(train=rows, validation=rows.remove_columns("label"))
    with pytest.raises(UserError, match=r"validation has columns \['img'\], not img and label"):
        standard_columns(splits, DataConfig())


def test_a_test_split_without_a_label_column_is_left_out(save, make_rows, caplog):
    caplog.set_level("INFO")
    rows = make_rows([0, 1, 1, 0])
    assert list(source(save(train=rows, test=rows.remove_columns("label")))) == ["train"]
    assert "split test has no column 'label', and is left out" in caplog.text


@pytest.mark.parametrize("hidden", [-1, None])
def test_hidden_test_labels_are_left_out(save, make_rows, hidden):
    folder = save(train=make_rows([0, 1, 1, 0]), test=make_rows([hidden] * 3))
    data = DataConfig(dataset_name=str(folder))
    assert list(load_source(data)) == ["train"]
    assert len(load_splits(data).train) == 2
    with pytest.raises(UserError, match=r"has no labelled test split, only .*; add one"):
        load_test_split(data)


def test_unlabelled_extra_split_is_left_out(save, make_rows):
    folder = save(unlabelled=make_rows([None] * 3), train=make_rows([0, 1]))
    assert list(source(folder)) == ["train"]


@pytest.mark.parametrize("empty", ["train", "validation", "test"])
def test_empty_split_is_refused(save, tmp_path, make_rows, empty):
    splits = {name: make_rows([0, 1, 0, 1]) for name in ("train", "validation", "test")}
    splits[empty] = splits[empty].select([])
    with pytest.raises(UserError, match="has no images"):
        source(save(**splits))
    with pytest.raises(UserError, match=f'"{empty}" corresponds to no data|has no images'):
        source(write_hub_layout(tmp_path / "hub", train=splits["train"], test=splits["test"])
               if empty != "validation" else save(**splits))  # fmt: skip


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no images; put them into one folder per class"):
        source(tmp_path)


def test_damaged_saved_data_set_is_refused(save, make_rows):
    folder = save(train=make_rows([0, 1]))
    (folder / "train" / "state.json").unlink()
    with pytest.raises(UserError, match="cannot load data set"):
        source(folder)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere"])
def test_missing_folder_is_refused(name):
    assert looks_like_path(name)
    with pytest.raises(UserError, match=f"no data set {name}: there is no such file or folder"):
        source(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("photso", r"no such file or folder \(nearest: photos\)"),
        ("photos/*", "pass a folder, not a pattern of files"),
        ("https://huggingface.co/datasets/a/b/tree/main", "; pass the id, a/b$"),
        ("s3://bucket/photos", "it is a URL: download it, and pass the file or folder"),
        ("file:///home/me/photos", "; pass /home/me/photos$"),
        (
            "photos/x.npz",
            r"x.npz is not a supported data set; load it in Python, .*finetune_classifier",
        ),
        ("photos/x.xlsx", "save it as CSV"),
        ("photos", r"no images among 2 files \(1 .npz, 1 .xlsx\); load it in Python"),
    ],
)
def test_what_to_do_with_what_is_no_data_set(tmp_path, name, message):
    (tmp_path / "photos").mkdir()
    for each in ("x.npz", "x.xlsx"):
        (tmp_path / "photos" / each).write_bytes(b"PK")
    with pytest.raises(UserError, match=message):
        source(name if "://" in name else tmp_path / name)


def test_images_beside_parquet_files(tmp_path, make_rows):
    folder = image_folder(tmp_path / "photos", "assets/logo.png")
    make_rows([0, 1, 0, 1]).to_parquet(str(folder / "train.parquet"))
    result = read_source(DataConfig(dataset_name=str(folder)))
    assert len(result.splits["train"]) == 4
    assert result.notes == ("photos: left out 1 image files beside the Parquet or tar files",)
    image_folder(folder, "cat/1.png", "dog/1.png")
    with pytest.raises(
        UserError, match=r"holds class folders \(assets, cat, dog\) and Parquet or tar"
    ):
        source(folder)


def test_a_folder_that_is_spelled_like_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "photos" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"bundled/digits \(nearest folder here: photos\)"):
        source("photso")
    with pytest.raises(UserError, match=r"\(nearest folder here: photos/train\)"):
        source("photos/tran")
    with pytest.raises(UserError, match="--dataset_name is empty"):
        source("")


def test_unknown_hub_and_bundled_names_are_refused():
    assert not looks_like_path("nobody/nothing")
    with pytest.raises(
        UserError, match=r"not in the local cache and HF_HUB_OFFLINE=1 .*bundled/dig"
    ):
        source("nobody/nothing")
    with pytest.raises(UserError, match=r"unknown bundled data set 'letters'.*bundled/digits"):
        source("bundled/letters")


def image_folder(root, *files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    return root


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a/1.png", "a/2.png"], "has one class folder, a; a classifier needs two"),
        (["1.png", "2.png"], "have no labels; put them into one folder per class"),
        (["a/1.png", "b/1.png", "stray.png"], r"stray\.png is not in a class folder"),
    ],
)
def test_wrong_class_folders_are_refused(tmp_path, files, message):
    folder = image_folder(tmp_path / "images", *files)
    with pytest.raises(UserError, match=message):
        load_source(DataConfig(dataset_name=str(folder)))
