"""hf_cifar.data.tables: images and labels that a table names."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, List
from PIL import Image

from hf_cifar.config.data import DataConfig
from hf_cifar.data.images import decode_cell
from hf_cifar.data.sources import load_source, read_source
from hf_cifar.data.splits import DataSource, load_splits
from hf_cifar.errors import UserError
from tests.pictures import encode

CLASSES = ("cat", "dog", "owl")
COLOURS = {"cat": "red", "dog": "blue", "owl": "lime"}


def label_of(i):
    return CLASSES[i % 3]


def photos(root, names, text=None, table="labels.csv"):
    """Write photo i of class i % 3 under each name, and a table."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), COLOURS[label_of(i)]).save(root / name)
    if text is not None:
        (root / table).parent.mkdir(parents=True, exist_ok=True)
        (root / table).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def source(root, **options):
    return load_source(DataConfig(dataset_name=str(root), **options))


def check(splits, count=9, split="train"):
    """Check that every row has the class whose colour it shows."""
    rows = splits[split]
    assert len(rows) == count
    names = rows.features["label"].names
    for cell, label in zip(rows["image"][:], rows["label"][:], strict=True):
        expected = Image.new("RGB", (1, 1), COLOURS[names[label]]).getpixel((0, 0))
        assert tuple(decode_cell(cell)[0, 0]) == expected


NAMES = [f"images/{i}.png" for i in range(9)]


def csv_of(path, separator=",", header="path,label"):
    lines = [header.replace(",", separator)] + [
        f"{path(i)}{separator}{label_of(i)}" for i in range(9)
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        csv_of(lambda i: f"images/{i}.png"),
        csv_of(lambda i: f"./images/{i}.png"),
        csv_of(lambda i: f"{i}.png"),
        csv_of(lambda i: i, header="id,label"),
        csv_of(lambda i: f"images/{i}", header="id,breed"),
        csv_of(lambda i: f"images\\{i}.png"),
        csv_of(lambda i: f"C:\\Users\\me\\images\\{i}.png"),
        csv_of(lambda i: f"/kaggle/input/animals/images/{i}.png"),
        csv_of(lambda i: f"IMAGES/{i}.PNG"),
        csv_of(lambda i: f" images/{i}.png "),
        csv_of(lambda i: f"images/{i}.png", ";"),
        csv_of(lambda i: f"images/{i}.png", "\t"),
        csv_of(lambda i: f"images/{i}.png", "|"),
        csv_of(lambda i: f'"images/{i}.png"'),
        csv_of(lambda i: f"images/{i}.png").replace("\n", "\r\n"),
        csv_of(lambda i: f"images/{i}.png").replace("\n", "\r"),
        b"\xef\xbb\xbf" + csv_of(lambda i: f"images/{i}.png").encode(),
        csv_of(lambda i: f"images/{i}.png").encode("utf-16"),
        csv_of(lambda i: f"images/{i}.png", header="naïve path,label").encode("cp1252"),
        csv_of(lambda i: f"images/{i}.png").split("\n", 1)[1],  # no header
        ",path,label\n" + "".join(f"{i},images/{i}.png,{label_of(i)}\n" for i in range(9)),
        "path,label,\n" + "".join(f"images/{i}.png,{label_of(i)},\n" for i in range(9)),
        "id,path,label\n" + "".join(f"{i},images/{i}.png,{label_of(i)}\n" for i in range(9)),
        'note,path,label\n' + "".join(f'"a, b ""{i}""",images/{i}.png,{label_of(i)}\n' for i in range(9)),
        "image,cat,dog,owl\n" + "".join(f"{i},{','.join(str(int(k == i % 3)) for k in range(3))}\n"
                                        for i in range(9)),
        "image,cat,dog,owl\n" + "".join(f"{i},{','.join(str(float(k == i % 3)) for k in range(3))}\n"
                                        for i in range(9)),
    ],
)  # fmt: skip
def test_a_table_is_found_by_itself(tmp_path, text):
    check(source(photos(tmp_path, NAMES, text)))


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl", ".ndjson", ".parquet"])
def test_other_forms_of_tables(tmp_path, suffix):
    rows = [{"file": f"images/{i}.png", "kind": label_of(i), "size": i / 7} for i in range(9)]
    path = photos(tmp_path, NAMES) / f"labels{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text("file\tkind\n" + "".join(f"{r['file']}\t{r['kind']}\n" for r in rows))
    check(source(tmp_path))
    check(source(path))


def test_a_table_apart_from_its_images(tmp_path):
    photos(tmp_path / "photos", NAMES)
    photos(tmp_path / "only", [], csv_of(lambda i: f"{tmp_path}/photos/images/{i}.png"))
    check(source(tmp_path / "only"))
    check(source(tmp_path / "only", image_column_name="path", label_column_name="label"))
    photos(tmp_path / "up", [], csv_of(lambda i: f"../photos/images/{i}.png"))
    check(source(tmp_path / "up"))
    table = tmp_path / "elsewhere.csv"
    table.write_text(csv_of(lambda i: f"{i}.png"))
    check(source(tmp_path / "photos", labels_file=str(table)))
    with pytest.raises(UserError, match=r"--labels_file .*nowhere.csv: there is no such file"):
        source(tmp_path / "photos", labels_file=str(tmp_path / "nowhere.csv"))
    with pytest.raises(UserError, match="--labels_file is for a folder of images"):
        source("some/name", labels_file=str(table))


def test_competition_layout_with_the_same_ids_in_test(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    photos(tmp_path, [f"train/{i}.png" for i in range(1, 10)])
    photos(tmp_path, [f"test/{i}.png" for i in range(0, 30)])
    lines = [f"{i + 1},{label_of(i)}\n" for i in range(9)]
    (tmp_path / "trainLabels.csv").write_text("id,label\n" + "".join(lines))
    (tmp_path / "sampleSubmission.csv").write_text(
        "id,label\n" + "".join(f"{i},cat\n" for i in range(30))
    )
    check(source(tmp_path))
    assert caplog.messages == [
        f"{tmp_path.name}: 3 classes from column 'label' of trainLabels.csv, 9 images; train/ is a split; "
        "left out: 31 files (30 not in trainLabels.csv, 1 .csv)"
    ]


def test_folders_of_a_table_are_splits(tmp_path):
    names = [f"{'Training' if i < 9 else 'Testing'}/{i}.png" for i in range(15)]
    text = "path,label\n" + "".join(f"{name},{label_of(i)}\n" for i, name in enumerate(names))
    splits = source(photos(tmp_path, names, text))
    check(splits)
    check(splits, 6, "test")


def test_a_column_names_the_splits(tmp_path):
    parts = ["train", "Test", "val"]
    lines = [f"images/{i}.png,{label_of(i)},{parts[i // 3]}\n" for i in range(9)]
    photos(tmp_path, NAMES, "path,label,split\n" + "".join(lines))
    result = read_source(DataConfig(dataset_name=str(tmp_path)))
    for split in ("train", "validation", "test"):
        check(result.splits, 3, split)
    assert "train, val (validation), Test (test) are splits" in result.description


def test_a_column_of_splits_is_known_by_its_values(tmp_path):
    lines = [
        f"images/{i}.png,{label_of(i)},{'test set' if i > 5 else 'train set'}\n" for i in range(9)
    ]
    photos(tmp_path, NAMES, "path,label,used for\n" + "".join(lines))
    check(source(tmp_path), 6)
    lines = [line.replace("test set", "later") for line in lines]
    photos(tmp_path, NAMES, "path,label,split\n" + "".join(lines))
    with pytest.raises(
        UserError, match=r"'split' of labels.csv are not all names of splits: 'later', 'train"
    ):
        source(tmp_path)


def test_ids_that_lost_their_zeros_are_refused_with_the_names_of_the_files(tmp_path):
    lines = [f"{i},{label_of(i)}\n" for i in range(9)]
    photos(tmp_path, [f"img/{i:03}.png" for i in range(9)], "id,label\n" + "".join(lines))
    called = r"images are called img/000\.png, img/001\.png, img/002\.png"
    with pytest.raises(UserError, match=called):
        source(tmp_path, labels_file="labels.csv")
    with pytest.raises(UserError, match=called):
        source(tmp_path, labels_file="labels.csv", image_column_name="id")


def test_only_some_folders_of_a_table_are_splits(tmp_path):
    names = [f"{('train', 'test', 'extra')[i // 3]}/{i}.png" for i in range(9)]
    text = "path,label\n" + "".join(f"{name},{label_of(i)}\n" for i, name in enumerate(names))
    photos(tmp_path, names, text)
    with pytest.raises(
        UserError, match=r"names images in test/, train/ and in extra/; add a column split"
    ):
        source(tmp_path, labels_file="labels.csv")
    check(source(tmp_path, labels_file="labels.csv", folders="classes"))


def test_fractions_are_no_labels(tmp_path):
    lines = [f"images/{i}.png,{i / 7:.3f}\n" for i in range(9)]
    photos(tmp_path, NAMES, "path,label\n" + "".join(lines))
    with pytest.raises(UserError, match=r"the labels are numbers such as 0\.000, not classes"):
        source(tmp_path)


@pytest.mark.parametrize("option", [{"labels_file": "x.csv"}, {"folders": "splits"}])
def test_options_of_folders_are_refused_for_other_data(tmp_path, save, make_rows, option):
    for name in ("bundled/digits", "some/name", save(train=make_rows([0, 1]))):
        with pytest.raises(
            UserError, match=f"--{next(iter(option))} is for a folder of images, and"
        ):
            source(name, **option)


def test_class_that_only_test_has_is_refused(tmp_path):
    lines = [
        f"images/{i}.png,{label_of(i)},{'test' if i % 3 == 2 else 'train'}\n" for i in range(9)
    ]
    photos(tmp_path, NAMES, "path,label,split\n" + "".join(lines))
    with pytest.raises(
        UserError, match=r"class 'owl' of labels.csv is only in test \(3 images\), not in"
    ):
        source(tmp_path)


def test_missing_files_are_counted_and_named(tmp_path, caplog):
    photos(tmp_path, NAMES[:6], csv_of(lambda i: f"images/{i}.png"))
    photos(tmp_path, ["images/extra.png"])
    (tmp_path / "images/notes.txt").write_text("x")
    check(source(tmp_path), 6)
    assert (
        "labels.csv: left out 3 of 9 rows that name no image: images/6.png, images/7.png, images/8.png"
    ) in caplog.messages
    facts = DataSource(DataConfig(dataset_name=str(tmp_path))).facts
    assert facts["left_out"] == {".txt": 1, "not in labels.csv": 1}
    assert facts["rows_left_out"] == {"naming no image": 3}
    assert facts["description"].endswith(
        "left out: 2 files (1 .txt, 1 not in labels.csv) and 3 rows (3 naming no image)"
    )


def test_no_image_of_the_table_exists(tmp_path):
    photos(tmp_path, NAMES, csv_of(lambda i: f"pictures/p{i}.jpg"))
    with pytest.raises(
        UserError, match=r"none of the 9 images in column 'path' of labels.csv is in .*p0.jpg"
    ):
        source(tmp_path, labels_file="labels.csv")
    with pytest.raises(
        UserError, match=r"none of the 9 images that labels.csv names is in .*pictures/p0"
    ):
        source(tmp_path, labels_file="labels.csv", image_column_name="path")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["None", "NA", "nan"], ["NA", "None", "nan"]),
        (["10", "9", "2"], ["2", "9", "10"]),
        (["1.0", "0.0", "2.0"], ["0", "1", "2"]),
        (["007", "7", "x"], ["007", "7", "x"]),
        (["True", "False", "True"], ["False", "True"]),
        (["a, b", "c;d", "e\tf"], ["a, b", "c;d", "e\tf"]),
    ],
)
def test_labels_are_text(tmp_path, labels, names):
    lines = [f'images/{i}.png,"{labels[i % 3]}"\n' for i in range(9)]
    photos(tmp_path, NAMES, "path,label\n" + "".join(lines))
    assert source(tmp_path)["train"].features["label"].names == names


def test_rows_without_a_label_or_repeated(tmp_path, caplog):
    text = csv_of(lambda i: f"images/{i}.png").replace("8.png,owl", "8.png,") + "images/0.png,cat\n"
    check(source(photos(tmp_path, NAMES, text)), 8)
    assert "labels.csv: left out 1 of 10 rows without a label: images/8.png" in caplog.messages
    assert "labels.csv: left out 1 of 10 rows that repeat an image" in caplog.messages


def test_two_labels_of_one_image_are_refused(tmp_path):
    text = csv_of(lambda i: f"images/{i}.png") + "images/0.png,dog\n"
    with pytest.raises(
        UserError, match=r"images/0.png two labels, 'cat' in row 1 and 'dog' in row 10"
    ):
        source(photos(tmp_path, NAMES, text))


def test_two_tables_are_listed(tmp_path):
    photos(tmp_path, NAMES, csv_of(lambda i: f"images/{i}.png"))
    (tmp_path / "other.csv").write_text(csv_of(lambda i: i, header="id,label"))
    with pytest.raises(
        UserError,
        match=r"multiple tables have labels for these images: labels.csv, other.csv; choose .*--labels_file",
    ):
        source(tmp_path)
    check(source(tmp_path, labels_file="other.csv"))


def test_a_table_in_the_folder_of_each_split(tmp_path):
    for part in ("train", "test"):
        folder = photos(tmp_path / part, [f"{i}.png" for i in range(9)])
        rows = "".join(
            f"{i}.png," + ",".join(str(int(k == i % 3)) for k in range(3)) + "\n" for i in range(9)
        )
        (folder / "_classes.csv").write_text(f"filename,cat,dog,owl\n{rows}")
    splits = source(tmp_path)
    check(splits)
    check(splits, split="test")


@pytest.mark.parametrize(
    "content",
    [
        [{"file": name, "label": label_of(i)} for i, name in enumerate(NAMES)],
        {name: label_of(i) for i, name in enumerate(NAMES)},
    ],
)
def test_json(tmp_path, content):
    photos(tmp_path, NAMES, json.dumps(content), "labels.json")
    check(source(tmp_path, labels_file="labels.json"))
    check(source(tmp_path / "labels.json"))
    with pytest.raises(UserError, match=r"images; .* If labels.json has the labels, pass --labels"):
        source(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.csv", "file,label\n", r"labels.csv is not used: .*labels.csv has no rows"),
        (
            "labels.csv",
            "file,label\n0,cat\n1,cat\n2,cat\n",
            "has one class, cat; a classifier needs two",
        ),
        ("labels.xlsx", "PK", "labels.xlsx is not read: save it as CSV"),
        ("a/list.txt", "0 1", "If list.txt has the labels, pass --labels_file a/list.txt"),
        ("labels.mat", "MATLAB", r"Labels in files such as labels.mat are not read"),
        ("images/1.xml", "<x/>", r"Labels in XML files such as images/1.xml are not read"),
    ],
)
def test_why_a_table_is_not_used(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        source(photos(tmp_path, NAMES, text, name))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.xlsx", "PK", "is a spreadsheet; save it as CSV"),
        (
            "labels.json",
            '{"images": [], "annotations": []}',
            "is not a list of objects such as .*into a CSV",
        ),
        (
            "labels.csv",
            "file,cat,dog\n0,1,1\n1,0,1\n2,1,0\n",
            "in some rows more than one is 1; choose",
        ),
    ],
)
def test_requested_tables_that_are_not_read(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        source(photos(tmp_path, NAMES, text, name), labels_file=name)


def test_a_requested_column_that_does_not_exist(tmp_path):
    photos(tmp_path, NAMES, csv_of(lambda i: i))
    with pytest.raises(UserError, match=r"only path, label \(nearest: label\)"):
        source(tmp_path, label_column_name="labl")


def test_lists_as_text(tmp_path):
    rows = "".join(f"{i},\"['{label_of(i)}', 'pet']\"\n" for i in range(9))
    found = source(photos(tmp_path, NAMES, f"id,label\n{rows}"))["train"]
    assert found.features["label"] == List(ClassLabel(names=["cat", "dog", "owl", "pet"]))
    assert found["label"][:3] == [[0, 3], [1, 3], [2, 3]]


def test_the_separator_line_of_excel(tmp_path):
    text = "sep=;\n" + csv_of(lambda i: i, ";")
    result = read_source(DataConfig(dataset_name=str(photos(tmp_path, NAMES, text))))
    check(result.splits)
    assert not result.rows_left_out


@pytest.mark.parametrize(
    ("column", "values", "shown"),
    [("split", "012", "'0', '1', '2'"), ("is_valid", ["True", "False"], "'False', 'True'")],
)
def test_a_column_that_divides_the_rows_in_other_words(tmp_path, column, values, shown):
    rows = "".join(f"{i},{label_of(i)},{values[i % len(values)]}\n" for i in range(9))
    photos(tmp_path, NAMES, f"id,label,{column}\n{rows}")
    with pytest.raises(
        UserError,
        match=f"column '{column}' of labels.csv are not all names of splits: {shown}; use",
    ):
        source(tmp_path)


def test_classes_that_differ_in_case(tmp_path):
    text = csv_of(lambda i: i).replace("1,dog", "1,Dog").replace("4,dog", "4,Dog")
    result = read_source(DataConfig(dataset_name=str(photos(tmp_path, NAMES, text))))
    assert result.notes[-1].startswith(
        "classes 'Dog' and 'dog' differ only in upper and lower case"
    )


def test_a_clear_table_of_test_beside_one_of_train_that_is_not(tmp_path):
    rows = "".join(f"{i},{label_of(i)},{i % 2}\n" for i in range(9))
    photos(tmp_path / "Train", [f"{i}.png" for i in range(9)])
    photos(tmp_path / "Test", [f"t{i}.png" for i in range(9)])
    (tmp_path / "Meta.csv").write_text(f"id,form,shape\n{rows}")
    (tmp_path / "Train.csv").write_text(f"id,kind,shape\n{rows}")
    (tmp_path / "Test.csv").write_text(csv_of(lambda i: f"t{i}"))
    with pytest.raises(
        UserError,
        match=r"Test.csv labels only images of test, and Train.csv cannot be used: the label",
    ):
        source(tmp_path)
    check(source(tmp_path, labels_file="Train.csv", label_column_name="kind"))
    (tmp_path / "Test.csv").write_text(csv_of(lambda i: i))
    check(source(tmp_path))


def test_a_table_for_each_split(tmp_path):
    text = csv_of(lambda i: f"images/{i}.png").splitlines()
    photos(tmp_path, NAMES, "\n".join(text[:7]), "train_labels.csv")
    photos(tmp_path, [], "\n".join([text[0], *text[7:]]), "test_labels.csv")
    result = read_source(DataConfig(dataset_name=str(tmp_path)))
    check(result.splits, 6)
    check(result.splits, 3, "test")
    assert result.description == (
        f"{tmp_path.name}: 3 classes from column 'label' of train_labels.csv and test_labels.csv, 9 images; "
        "train_labels.csv (train), test_labels.csv (test) are splits"
    )
    photos(tmp_path, [], "\n".join([text[0], *text[6:]]), "test_labels.csv")
    with pytest.raises(UserError, match=r"images/5.png is in test_labels.csv and in another table"):
        source(tmp_path)


def test_columns_that_are_not_clear_are_listed(tmp_path, caplog):
    lines = [f"images/{i}.png,{label_of(i)},{'ab'[i % 2]}\n" for i in range(9)]
    photos(tmp_path, NAMES, "path,kind,colour\n" + "".join(lines))
    with pytest.raises(UserError, match=r"ambiguous: kind, colour could be .*--label_column_name"):
        source(tmp_path)
    check(source(tmp_path, label_column_name="kind"))
    with pytest.raises(
        UserError, match=r"no column 'kid' in labels.csv, only path, kind, colour \(nearest"
    ):
        source(tmp_path, label_column_name="kid", labels_file="labels.csv")
    (tmp_path / "labels.csv").write_text("path,colour,Class\n" + "".join(
        f"images/{i}.png,{'ab'[i % 2]},{label_of(i)}\n" for i in range(9)))  # fmt: skip
    check(source(tmp_path))
    assert "labels.csv: the labels are in column 'Class'; not used: colour" in caplog.messages


def test_two_columns_of_images_are_listed(tmp_path):
    photos(tmp_path, [*NAMES, *(f"masks/{i}.png" for i in range(9))])
    lines = [f"images/{i}.png,masks/{i}.png,{label_of(i)}\n" for i in range(9)]
    (tmp_path / "labels.csv").write_text("photo,mask,label\n" + "".join(lines))
    with pytest.raises(UserError, match=r"multiple columns .*: photo, mask; .*--image_column_name"):
        source(tmp_path)
    check(source(tmp_path, image_column_name="photo"))


def test_names_that_exist_twice_are_refused(tmp_path):
    photos(tmp_path, [f"{folder}/{i}.png" for folder in ("left", "right") for i in range(9)])
    (tmp_path / "labels.csv").write_text(csv_of(lambda i: f"{i}.png"))
    with pytest.raises(
        UserError, match=r"images that exist twice, such as left/0.png and right/0.png"
    ):
        source(tmp_path)


def test_class_folders_and_a_table_that_contradict_each_other(tmp_path):
    names = [f"part{i % 2}/{i}.png" for i in range(9)]
    text = "path,label\n" + "".join(f"{name},{label_of(i)}\n" for i, name in enumerate(names))
    photos(tmp_path, names, text)
    with pytest.raises(
        UserError, match=r"the folders \(part0, part1\) and labels.csv \(cat, dog, owl\)"
    ):
        source(tmp_path)
    check(source(tmp_path, labels_file="labels.csv"))
    assert len(source(tmp_path, folders="classes")["train"].features["label"].names) == 2


def test_class_folders_and_a_table_that_agree(tmp_path):
    names = [f"{label_of(i)}/{i}.png" for i in range(9)]
    text = "path,label\n" + "".join(
        f"{name},{label_of(i).upper()}\n" for i, name in enumerate(names)
    )
    check(source(photos(tmp_path, names, text)))


def test_other_tables_beside_class_folders(tmp_path):
    names = [f"{label_of(i)}/{i}.png" for i in range(9)]
    sizes = "path,width,height\n" + "".join(f"{name},{i},{i / 7}\n" for i, name in enumerate(names))
    check(source(photos(tmp_path, names, sizes)))
    kinds = "path,colour,kind\n" + "".join(
        f"{name},{'ab'[i % 2]},{label_of(i)[0]}\n" for i, name in enumerate(names)
    )
    check(source(photos(tmp_path, names, kinds)))
    colours = "path,age,colour\n" + "".join(
        f"{name},{i // 3},{'ab'[i % 2]}\n" for i, name in enumerate(names)
    )
    photos(tmp_path, names, colours)
    with pytest.raises(
        UserError, match=r"in folders \(cat, dog, owl\), and labels.csv .* age, colour could"
    ):
        source(tmp_path)
    check(source(tmp_path, folders="classes"))


def test_predictions_are_no_labels(tmp_path):
    names = [f"{label_of(i)}/{i}.png" for i in range(9)]
    rows = [
        {"path": n, "label": "cat" if i % 2 else "dog", "top_k": []} for i, n in enumerate(names)
    ]
    photos(tmp_path, names, "\n".join(map(json.dumps, rows)), "predicted.jsonl")
    check(source(tmp_path))


def test_parquet_of_images_is_no_table_of_paths(tmp_path):
    rows = [{"image": {"bytes": encode(Image.new("RGB", (4, 4), COLOURS[label_of(i)])), "path": f"{i}.png"},
             "label": label_of(i)} for i in range(9)]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="holds images itself, not their paths"):
        source(tmp_path, labels_file="train.parquet")


def test_metadata_with_labels(tmp_path):
    text = "file_name,label\n" + "".join(f"images/{i}.png,{label_of(i)}\n" for i in range(9))
    check(source(photos(tmp_path, NAMES, text, "metadata.csv")))


def test_metadata_of_each_split(tmp_path):
    for split, numbers in (("train", range(9)), ("test", range(3))):
        lines = [f"{i}.png,{label_of(i)},{i}\n" for i in numbers]
        photos(tmp_path, [f"{split}/{i}.png" for i in numbers], "file_name,kind,age\n" + "".join(lines),
               f"{split}/metadata.csv")  # fmt: skip
    splits = source(tmp_path, label_column_name="kind")
    check(splits)
    check(splits, 3, "test")


def test_class_folders_beside_metadata_without_labels(tmp_path):
    names = [f"{label_of(i)}/{i}.png" for i in range(9)]
    text = "file_name,caption\n" + "".join(
        f"{name},photo {i % 2}\n" for i, name in enumerate(names)
    )
    check(source(photos(tmp_path, names, text, "metadata.csv")))
    check(source(tmp_path, label_column_name="label"))
    labels = source(tmp_path, label_column_name="caption")["train"].features["label"].names
    assert labels == ["photo 0", "photo 1"]


def test_lists_of_labels(tmp_path):
    rows = [{"file_name": n, "tags": ["cat", "dog"][: i % 3]} for i, n in enumerate(NAMES)]
    photos(tmp_path, NAMES, "\n".join(map(json.dumps, rows)), "metadata.jsonl")
    splits = source(tmp_path, label_column_name="tags")
    assert splits["train"].features["label"] == List(ClassLabel(names=["cat", "dog"]))
    assert splits["train"]["label"][:3] == [[], [0], [0, 1]]


def test_training_splits_of_a_table(tmp_path):
    names = [f"images/{i}.png" for i in range(30)]
    text = "path,label\n" + "".join(f"{name},{label_of(i)}\n" for i, name in enumerate(names))
    splits = load_splits(DataConfig(dataset_name=str(photos(tmp_path, names, text))))
    assert len(splits.train) == 27 and splits.id2label == dict(enumerate(CLASSES))


def json_lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.mark.parametrize("single", ["cat", ["cat"]])
def test_lists_of_labels_are_found_by_name(tmp_path, single):
    """One label alone is a list of one."""
    rows = [
        {"file_name": f"{i}.png", "labels": ["cat", "owl"] if i % 2 else single} for i in range(9)
    ]
    root = photos(tmp_path, [f"{i}.png" for i in range(9)], json_lines(rows), "metadata.jsonl")
    found = source(root)["train"]
    assert found.features["label"] == List(ClassLabel(names=["cat", "owl"]))
    assert sorted(map(len, found["label"])) == [1] * 5 + [2] * 4


def test_tables_of_lists_and_of_single_labels_are_not_joined(tmp_path):
    lists = "path,label\n" + "".join(f"train/{i}.png,\"['cat', 'dog']\"\n" for i in range(9))
    single = csv_of(lambda i: f"test/{i}.png", header="path,label")
    root = photos(tmp_path, [f"train/{i}.png" for i in range(9)], lists, "train.csv")
    photos(root, [f"test/{i}.png" for i in range(9)], single.replace("owl", "dog"), "test.csv")
    with pytest.raises(UserError, match=r"train.csv has lists of labels, and test.csv one label"):
        source(root)


def test_line_separators_inside_of_json_text(tmp_path):
    rows = [{"path": NAMES[i], "label": label_of(i), "text": "a\u2028b"} for i in range(9)]
    check(source(photos(tmp_path, NAMES, json_lines(rows), "labels.jsonl")))


def test_every_metadata_file_is_used_and_not_counted(tmp_path):
    for part in ("train", "test"):
        rows = "".join(f"{i}.png,{label_of(i)}\n" for i in range(9))
        photos(
            tmp_path / part, [f"{i}.png" for i in range(9)], f"file_name,label\n{rows}",
            "metadata.csv",
        )  # fmt: skip
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert read_source(DataConfig(dataset_name=str(tmp_path))).left_out == {".csv": 1}


def test_another_table_is_counted_beside_a_table_elsewhere(tmp_path):
    root = photos(tmp_path / "photos", NAMES, "a,b\n1,2\n", "notes.csv")
    (tmp_path / "labels.csv").write_text(csv_of(lambda i: f"images/{i}.png"))
    config = DataConfig(dataset_name=str(root), labels_file=str(tmp_path / "labels.csv"))
    assert read_source(config).left_out == {".csv": 1}


def test_an_empty_cell_in_the_first_line_of_a_table_without_names(tmp_path):
    text = "".join(f"{NAMES[i]},{'' if i == 0 else label_of(i)}\n" for i in range(9))
    root = photos(tmp_path, NAMES, text)
    check(source(root, label_column_name="column 2"), count=8)


def test_classes_that_are_almost_numbers(tmp_path):
    text = "path,label\n" + "".join(f"{NAMES[i]},--{i % 3}\n" for i in range(9))
    names = source(photos(tmp_path, NAMES, text))["train"].features["label"].names
    assert names == ["--0", "--1", "--2"]
