"""hf_cifar.data.listing and layout: what a folder of images is, decided by its listing."""

import os
import sys
import unicodedata
from collections import Counter

import pytest
from PIL import Image

from hf_cifar.config.data import DataConfig
from hf_cifar.config.run import RunConfig
from hf_cifar.data.formats import looks_like_image
from hf_cifar.data.images import decode_cell
from hf_cifar.data.layout import NoClassFolders, read_layout, split_roles
from hf_cifar.data.listing import list_files, list_images
from hf_cifar.data.sources import load_source, read_source
from hf_cifar.data.splits import DataSource
from hf_cifar.errors import UserError
from tests.pictures import encode

PICTURE = Image.new("RGB", (4, 4), "red")
PNG = encode(PICTURE)


def build(root, *names):
    """Make files: of an image if nothing follows the name, else with the text after `=`; folders end in /."""
    for name in names:
        name, _, text = name.partition("=")
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if text else PNG)
    return root


def layout(root, *names, folders="auto"):
    return read_layout(list_files(build(root, *names)), folders)


def found(layout):
    """The number of images of each class, by split."""
    return {
        split: dict(sorted(Counter(name for _, name in rows).items()))
        for split, rows in layout.splits.items()
    }


def several(*folders, count=2):
    return [f"{folder}/{i}.png" for folder in folders for i in range(count)]


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["cat", "dog"], {"train": {"cat": 2, "dog": 2}}),
        (["cat/2023", "cat/2024", "dog/a/b/c"], {"train": {"cat": 4, "dog": 2}}),
        (["cat", "cat/best", "dog"], {"train": {"cat": 4, "dog": 2}}),
        (["bus", "car", "train"], {"train": {"bus": 2, "car": 2, "train": 2}}),
        (["bus", "car", "train/old"], {"train": {"bus": 2, "car": 2, "train": 2}}),
        (["valid", "invalid"], {"train": {"valid": 2, "invalid": 2}}),
        (["blood test", "urine test"], {"train": {"blood test": 2, "urine test": 2}}),
        (["train station", "my train set"], {"train": {"train station": 2, "my train set": 2}}),
        (["train/cat", "train/dog", "test/cat"], {"train": {"cat": 2, "dog": 2}, "test": {"cat": 2}}),
        (["Training/a", "Training/b", "Testing/b"], {"train": {"a": 2, "b": 2}, "test": {"b": 2}}),
        (["train/a", "train/b", "Val/a"], {"train": {"a": 2, "b": 2}, "validation": {"a": 2}}),
        (["train/a", "train/b", "valid/a", "test/b"],
         {"train": {"a": 2, "b": 2}, "validation": {"a": 2}, "test": {"b": 2}}),
        (["train/a", "train/b", "val/a", "eval/b"],
         {"train": {"a": 2, "b": 2}, "validation": {"a": 2}, "test": {"b": 2}}),
        (["training_set/a", "training_set/b", "test-set/a"],
         {"train": {"a": 2, "b": 2}, "test": {"a": 2}}),
        (["TrainImages/a", "TrainImages/b", "TestImages/a"],
         {"train": {"a": 2, "b": 2}, "test": {"a": 2}}),
        (["seg_train/a", "seg_train/b", "seg_test/a"], {"train": {"a": 2, "b": 2}, "test": {"a": 2}}),
        (["train/train/a", "train/train/b", "test/test/a"],
         {"train": {"a": 2, "b": 2}, "test": {"a": 2}}),
        (["train/images/a", "train/images/b", "test/images/a"],
         {"train": {"a": 2, "b": 2}, "test": {"a": 2}}),
        (["train/a/images", "train/b/images", "test/a/images"],
         {"train": {"a": 2, "b": 2}, "test": {"a": 2}}),
        (["photos/cat", "photos/dog"], {"train": {"cat": 2, "dog": 2}}),
        (["photos/photos/photos/cat", "photos/photos/photos/dog"], {"train": {"cat": 2, "dog": 2}}),
        (["photos/train/cat", "photos/train/dog", "photos/test/dog"],
         {"train": {"cat": 2, "dog": 2}, "test": {"dog": 2}}),
        (["train/train", "train/bus"], {"train": {"bus": 2, "train": 2}}),
    ],
)  # fmt: skip
def test_splits_and_classes(tmp_path, folders, splits):
    assert found(layout(tmp_path, *several(*folders))) == splits


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (several("train/a", "train/b", "extra/a"), r"two ways: train/ as splits with the classes a, b, "
         r"without extra/; or extra, train as classes. Pass --folders splits or --folders classes"),
        (several("bus/a", "bus/b", "train/a", "train/b"), "can be read in two ways"),
        (several("train", "test", "bus"), "can be read in two ways"),
        (several("seg_train/a", "seg_train/b", "seg_test/a", "seg_pred"), "without seg_pred/"),
        (several("train", "test"), r"train holds 2 images and no class folders; make one .*--labels_file"),
        (several("Train/a", "Train/b", "train_set/a"), r"Train/, train_set/ in .* are all named as train"),
        (several("train/a", "train/b", "test/a", "test/c"), r"class 'c' is only in test/ \(2 images\)"),
        (several("train/a", "train/b", "val/c"), r"class 'c' is only in val/ \(2 images\), not in train"),
        ([*several("a", "b"), "1.png", "2.png"], r"1.png \(and 1 more\) is not in a class folder"),
        ([*several("train/a", "train/b"), "train/1.png"], r"train/1.png is not in a class folder"),
        (several("a"), "has one class folder, a; a classifier needs two or more"),
        (["1.png", "2.png"], "have no labels; put them into one folder per class, or pass --labels_file"),
        ([*several("a", "b"), "fox/1.svg=<svg/>", "fox/2.svg=<svg/>"],
         r"fox has no image that can be read, only 2 files \(2 .svg\); convert them"),
        ([*several("a", "b"), "raw/1.nef=II*\0"], r"raw has no image that can be read, only 1 file "),
        ([*several("a", "b"), "c/1.npy=x"], r"c has no image that can be read, only 1 file \(1 .npy\)"),
        (several("a/train", "a/test", "b/train", "b/test"),
         r"a/, b/ in .* each hold splits, test/, train/; make those the top folders, .*--folders classes"),
        (several("fold1/a", "fold1/b", "fold2/a", "fold2/b"), r"two ways: fold1, fold2 as classes; or "
         r"a/, b/ in fold1/, fold2/ as classes. Merge them into one folder per class, or pass --folders"),
        (several("2023/a", "2023/b", "2024/a", "2024/b"), "two ways: 2023, 2024 as classes"),
        (several("images/a", "images/b", "masks/a", "masks/b"), r"Pass .*images, or --folders classes"),
        (several("data/data/a", "data/data/b", "logos"), r"a/, b/ in data/ as classes. Pass .*data/data,"),
        (several("data/train/b", "data/test/b", "docs"), r"in data/ as splits. Pass .*data, or"),
        (several("labeled/a", "labeled/b", "unlabeled"), r"in labeled/ as classes. Pass .*labeled, or"),
        (several("a/train/b", "a/test/b", "docs"), r"test/, train/ in a/ as splits. Pass .*a, or"),
    ],
)  # fmt: skip
def test_unclear_folders_are_refused(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        layout(tmp_path, *files)


def test_a_flag_decides_between_two_readings(tmp_path):
    build(tmp_path, *several("train/a", "train/b", "extra/a"))
    listing = list_files(tmp_path)
    splits = read_layout(listing, "splits")
    assert found(splits) == {"train": {"a": 2, "b": 2}}
    assert splits.left_out == {"in extra/": 2}
    assert found(read_layout(listing, "classes")) == {"train": {"extra": 2, "train": 4}}
    source = load_source(DataConfig(dataset_name=str(tmp_path), folders="splits"))
    assert source["train"].features["label"].names == ["a", "b"]
    with pytest.raises(UserError, match=r"no folder in .* is named as a split, only a, b"):
        layout(tmp_path / "other", *several("a", "b"), folders="splits")


@pytest.mark.parametrize(
    "test", [several("test"), several("test/images"), several("test/unknown"), several("test/test")]
)
def test_a_test_folder_without_classes_is_unlabelled(tmp_path, test):
    result = layout(tmp_path, *several("train/a", "train/b"), *test)
    assert found(result) == {"train": {"a": 2, "b": 2}}
    assert result.left_out.total() == 2 and "unlabelled in test" in next(iter(result.left_out))
    assert "its 2 images have no labels and are left out" in result.notes[0]
    source = DataSource(DataConfig(dataset_name=str(tmp_path)))
    with pytest.raises(UserError, match="no labelled test split"):
        source.test_split  # noqa: B018


def test_a_flat_test_folder_beside_classes_is_unlabelled(tmp_path):
    result = layout(tmp_path, *several("cat", "dog", "test"))
    assert found(result) == {"train": {"cat": 2, "dog": 2}}
    assert "left out; if it is a class, pass --folders classes" in result.notes[0]
    assert set(layout(tmp_path, folders="classes").class_names) == {"cat", "dog", "test"}


@pytest.mark.parametrize(
    ("files", "note"),
    [
        (several("a", "b"), None),
        (several("a/images", "b/images"), None),
        (several("a/images", "a/masks", "b/images", "b/masks"), "4 in images/, 4 in masks/"),
        (several("1/x", "1/y", "2/x"), "4 in x/, 2 in y/"),
        (several("a", "a/more", "b"), "2 in more/"),
    ],
)
def test_folders_below_the_classes_are_noted(tmp_path, files, note):
    notes = layout(tmp_path, *files).notes
    start = f"{tmp_path.name}/: images below the class folders are used: "
    assert notes == ([] if note is None else [start + note])


def test_folders_of_numbers_in_classes_of_numbers(tmp_path):
    files = several("0/1", "0/2", "1/1", "1/2")
    assert found(layout(tmp_path, *files)) == {"train": {"0": 4, "1": 4}}


def test_names_of_files_never_decide(tmp_path):
    names = ["train 1.png", "test.png", "a validation.png", "dev-0.png", "0-of-2-test-.png"]
    result = load_source(
        DataConfig(dataset_name=str(build(tmp_path, *(f"{c}/{n}" for c in "ab" for n in names))))
    )
    assert {split: len(rows) for split, rows in result.items()} == {"train": 10}


def test_everything_is_counted(tmp_path):
    result = layout(
        tmp_path / "photos",
        *several("a", "b"), "a/1.txt=cat", "a/1.xml=<x/>", "b/1.json={}", "b/noise.xyz=123", "b/README=hi",
        "a/.hidden.png", "a/._0.png=mac", ".git/config=x", ".cache/a/b/1.png", "__MACOSX/a/0.png=mac",
        "a/Thumbs.db=x", "desktop.ini=x", "a/.ipynb_checkpoints/0-checkpoint.png", ".ipynb_checkpoints/",
        "b/@eaDir/0.png/thumb.jpg=x",
    )  # fmt: skip
    assert found(result) == {"train": {"a": 2, "b": 2}}
    assert result.left_out == {
        ".txt": 1, ".xml": 1, ".json": 1, ".xyz": 1, "not images": 1, "hidden": 5, "system": 4,
    }  # fmt: skip
    assert result.describe() == (
        "2 classes from folders, 4 images; left out: 14 files (5 hidden, 4 system, 1 .json, 1 .txt, "
        "1 .xml, 1 .xyz and 1 more)"
    )


def test_folders_that_are_no_classes(tmp_path):
    result = layout(
        tmp_path,
        *several("a", "b"),
        "annotations/1.xml=<x/>",
        "annotations/2.xml=<x/>",
        "empty/",
        "a/none/",
        "logs/events.out.tfevents.1.host=x",
    )
    assert result.class_names == ["a", "b"]
    assert result.left_out == {".xml": 2, ".tfevents": 1}
    assert result.notes == [f"empty/ in {tmp_path.name}/ has no images: left out, not a class"]


def test_an_empty_folder_beside_one_class_is_not_entered(tmp_path):
    with pytest.raises(UserError, match="has one class folder, cat"):
        layout(tmp_path, *several("cat/2023", "cat/2024"), "dog/")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x", PNG), ("x.txt", PNG), ("x.JPG", b"text"), ("x.jpeg", b""), ("x.jfif", b"x"), ("x.2024", PNG),
        ("x.heic", b"x"), ("x.HEIF", b"x"), ("x.avif", b"x"), ("x.webp", b"x"), ("x.tiff", b"x"),
        ("x.dat", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), ("x.dat", b"\0\0\0\x18ftypavif"),
        ("x.dat", encode(PICTURE, "WEBP")), ("x.dat", encode(PICTURE, "TIFF")),
        ("x.dat", encode(PICTURE, "BMP")), ("x.dat", encode(PICTURE, "JPEG")),
        ("x.dat", encode(PICTURE, "GIF")), ("x.dat", encode(PICTURE, "PPM")),
        ("x.dat", encode(PICTURE, "JPEG2000")),
    ],
)  # fmt: skip
def test_images_by_suffix_or_content(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list_images(tmp_path) == ([str(tmp_path / name)], {})


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x", b"hello", "not images"), ("x.txt", b"P5 is a format", ".txt"), ("x.csv", b"BM,label", ".csv"),
        ("x.nef", b"II*\0 raw", ".nef"), ("x.ico", b"\0\0\1\0", ".ico"), ("x.eps", b"%!PS", ".eps"),
        ("x.mp4", b"\0\0\0\x18ftypisom", ".mp4"), ("x.wav", b"RIFF\0\0\0\0WAVE", ".wav"),
        ("x", b"", "not images"), ("x.a b", b"", "not images"),
    ],
)  # fmt: skip
def test_what_is_no_image(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert list_images(tmp_path) == ([], {reason: 1})


def test_the_first_bytes_of_every_format_that_pillow_writes():
    for form in (
        "JPEG",
        "PNG",
        "GIF",
        "WEBP",
        "TIFF",
        "BMP",
        "PPM",
        "JPEG2000",
        "AVIF",
        "DDS",
        "QOI",
    ):
        assert looks_like_image(encode(PICTURE, form)[:32]), form


@pytest.mark.skipif(sys.platform == "win32", reason="names that Windows does not allow")
@pytest.mark.parametrize(
    "name",
    ["[x]", "a*b", "what?", "🐈", "a b ", "two\nlines", "'\"", "%20#", "~", "-f", "$HOME", "{a,b}"],
)
def test_every_character_of_a_path_works(tmp_path, name):
    root = build(tmp_path / name, f"{name}/{name}.png", f"dog/{name}.png")
    rows = load_source(DataConfig(dataset_name=str(root)))["train"]
    assert set(rows.features["label"].names) == {name, "dog"}
    assert [decode_cell(cell).shape for cell in rows["image"][:]] == [(4, 4, 3)] * 2
    assert len(list_images(root)[0]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no text")
def test_names_that_are_no_unicode_text(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    with open(os.path.join(folder, b"\xe9.png"), "wb") as file:
        file.write(PNG)
    rows = load_source(DataConfig(dataset_name=str(build(tmp_path, "b/1.png"))))["train"]
    assert rows.features["label"].names == ["b", "caf\\xe9"]
    assert [decode_cell(cell).shape for cell in rows["image"][:]] == [(4, 4, 3)] * 2


@pytest.mark.parametrize("name", [".", "./", "../photos", "photos/.."])
def test_relative_paths(tmp_path, monkeypatch, name):
    build(tmp_path / "photos", *several("a", "b"))
    (tmp_path / "photos/photos").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    source = read_source(DataConfig(dataset_name=name))
    assert source.description == "photos: 2 classes from folders, 4 images"
    assert all(os.path.isabs(cell["path"]) for cell in source.splits["train"]["image"][:])


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    build(tmp_path / "photos", *several("a", "b"))
    assert len(load_source(DataConfig(dataset_name="~/photos"))["train"]) == 4


def test_unicode_forms_of_one_name(tmp_path):
    nfd, nfc = (unicodedata.normalize(form, "café") for form in ("NFD", "NFC"))
    splits = layout(tmp_path / "splits", *several(f"train/{nfd}", "train/b", f"test/{nfc}"))
    assert found(splits) == {"train": {nfc: 2, "b": 2}, "test": {nfc: 2}} and not splits.notes
    merged = layout(tmp_path / "one", *several(nfd, nfc, "b"))
    if len(os.listdir(tmp_path / "one")) == 3:  # macOS has one folder
        assert found(merged) == {"train": {nfc: 4, "b": 2}}
        assert (
            "two folders of this name in different Unicode forms are read as one" in merged.notes[0]
        )


def test_names_that_differ_in_case(tmp_path):
    splits = layout(tmp_path / "splits", *several("train/Cat", "train/dog", "test/cat"))
    assert found(splits) == {"train": {"Cat": 2, "dog": 2}, "test": {"Cat": 2}}
    assert splits.notes == ["test/cat is read as class 'Cat', which train has"]
    both = layout(tmp_path / "one", *several("Cat", "cat", "dog"))
    if len(os.listdir(tmp_path / "one")) == 3:  # else the disk ignores case
        assert both.class_names == ["Cat", "cat", "dog"]
        assert "classes 'Cat' and 'cat' differ only in upper and lower case" in both.notes[0]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a privilege")
def test_links_are_followed_and_cycles_are_not(tmp_path):
    build(tmp_path / "store", *several("one", "two"))
    root = build(tmp_path / "data", "dog/own.png")
    (root / "cat").symlink_to(tmp_path / "store/one")
    (root / "dog/more").symlink_to(tmp_path / "store/two")
    (root / "dog/again").symlink_to(tmp_path / "store/two")
    (root / "dog/loop").symlink_to(root)
    (root / "dog/self").symlink_to("self")
    (root / "dog/gone.png").symlink_to("nowhere.png")
    (root / "dog/linked.png").symlink_to(tmp_path / "store/one/0.png")
    os.mkfifo(root / "dog/pipe")
    result = read_layout(list_files(root))
    assert found(result) == {"train": {"cat": 2, "dog": 4}}
    assert result.left_out == {
        "already listed": 2, "broken": 2, "not images": 1,
    }  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="needs a privilege")
def test_splits_of_links_into_one_pool(tmp_path):
    build(tmp_path / "pool", *several("a", "b", "c", "d"))
    for link, target in {"train/x": "a", "train/y": "b", "test/x": "c", "test/y": "d"}.items():
        (tmp_path / "data" / link).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / link).symlink_to(tmp_path / "pool" / target)
    result = read_layout(list_files(tmp_path / "data"))
    assert found(result) == {"train": {"x": 2, "y": 2}, "test": {"x": 2, "y": 2}}


@pytest.mark.parametrize("place", ["outputs/run1", "run1", "outputs/a/seed-0", "a/run"])
def test_own_runs_are_left_out(tmp_path, place):
    build(
        tmp_path, *several("a", "b"), f"{place}/pictures/1.png", f"{place}/checkpoint-2/model.xyz=1"
    )
    (tmp_path / place / "config.yaml").write_text(RunConfig().to_yaml())
    result = read_layout(list_files(tmp_path))
    assert found(result) == {"train": {"a": 2, "b": 2}}
    assert result.left_out == {"of runs": 3} and not result.notes
    assert len(list_images(tmp_path)[0]) == 4


def test_a_config_of_another_program_is_no_run(tmp_path):
    result = layout(tmp_path, *several("a", "b"), "a/config.yaml=lr: 0.1")
    assert found(result) == {"train": {"a": 2, "b": 2}} and result.left_out == {".yaml": 1}


def test_flat_folders_have_no_class_folders(tmp_path):
    for number, names in enumerate((["1.png"], several("train"))):
        with pytest.raises(NoClassFolders):
            layout(tmp_path / str(number), *names)


def test_what_is_not_there_is_named(tmp_path):
    build(tmp_path, ".a/1.png", ".b/1.png")
    with pytest.raises(UserError, match=r"holds no images among 2 files \(2 hidden\)"):
        load_source(DataConfig(dataset_name=str(tmp_path)))


def test_rows_are_in_the_order_of_the_names(tmp_path):
    rows = load_source(
        DataConfig(dataset_name=str(build(tmp_path, "b/2.png", "b/10.png", "a/z.png", "a/d/0.png")))
    )["train"]
    names = [
        os.path.relpath(cell["path"], tmp_path).replace(os.sep, "/") for cell in rows["image"][:]
    ]
    assert names == ["a/d/0.png", "a/z.png", "b/10.png", "b/2.png"]
    assert rows["label"][:] == [0, 0, 1, 1]


def test_facts_are_plain_and_without_local_paths(tmp_path):
    build(tmp_path / "photos", *several("train/a", "train/b", "test/a"), "train/a/1.txt=x")
    facts = DataSource(DataConfig(dataset_name=str(tmp_path / "photos"))).facts
    assert facts == {
        "description": "photos: 2 classes from folders, 6 images; train/, test/ are splits; left out: 1 file "
        "(1 .txt)",
        "num_images": {"train": 4, "test": 2},
        "left_out": {".txt": 1},
        "rows_left_out": {},
    }


def test_streaming_a_folder_of_images_is_refused(tmp_path):
    build(tmp_path, *several("a", "b"))
    with pytest.raises(UserError, match="which a stream cannot shuffle; leave out --streaming"):
        DataSource(DataConfig(dataset_name=str(tmp_path), streaming=True)).splits  # noqa: B018


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["train", "TEST", "Validation"], ["train", "test", "validation"]),
        (["trainset", "testset"], ["train", "test"]),
        (["train2017", "val2017"], ["train", "validation"]),
        (["flowers-train", "flowers-dev"], ["train", "validation"]),
        (["Evaluation Data"], ["validation"]),
        (["trains", "testament", "retrain", "value"], []),
        (["train a", "train b"], []),
        (["data", "images"], []),
    ],
)
def test_common_forms_of_split_words(names, roles):
    assert list(split_roles(names).values()) == roles
