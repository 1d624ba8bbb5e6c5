"""hf_cifar.data.archives: zip and tar files of images, unpacked into the cache."""

import io
import os
import stat
import tarfile
import zipfile

import pytest
from PIL import Image

from hf_cifar.config.data import DataConfig
from hf_cifar.data import archives
from hf_cifar.data.archives import unpack
from hf_cifar.data.cache import cache_folder
from hf_cifar.data.sources import load_source, open_data_set
from hf_cifar.errors import UserError
from tests.pictures import encode

PNG = encode(Image.new("RGB", (4, 4), "red"))
CATS = {f"{name}/{i}.png": PNG for name in ("cat", "dog") for i in range(2)}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CIFAR_CACHE", str(tmp_path / "cache"))


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files, links=()):
    modes = {".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz", ".bz2": "w:bz2"}
    with tarfile.open(path, modes.get(path.suffix, "w")) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target, kind in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return path


def write(path, files):
    return (write_zip if path.suffix.lower() == ".zip" else write_tar)(path, files)


def source(path):
    return load_source(DataConfig(dataset_name=str(path)))


def counts(splits):
    return {split: len(rows) for split, rows in splits.items()}


@pytest.mark.parametrize("suffix", ["zip", "ZIP", "tar", "tar.gz", "tgz", "tar.xz", "tar.bz2"])
@pytest.mark.parametrize("wrapper", ["", "photos/", "a/b/"])
def test_archive_of_class_folders(tmp_path, suffix, wrapper):
    path = write(tmp_path / f"photos.{suffix}", {wrapper + name: PNG for name in CATS})
    splits = source(path)
    assert counts(splits) == {"train": 4}
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert sorted(os.listdir(tmp_path)) == ["cache", path.name]  # nothing is unpacked beside it
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / path.name)
    assert counts(source(folder)) == {"train": 4}


def test_archives_of_the_splits_and_a_table(tmp_path):
    root = tmp_path / "competition"
    root.mkdir()
    write_zip(root / "train.zip", {f"train/{i}.png": PNG for i in range(6)})
    write_zip(root / "test.zip", {f"test/{i}.png": PNG for i in range(9)})
    (root / "train_labels.csv").write_text(
        "id,label\n" + "".join(f"{i},{'ab'[i % 2]}\n" for i in range(6))
    )
    assert counts(source(root)) == {"train": 6}


def test_archive_with_splits(tmp_path):
    files = {f"{split}/{name}": PNG for split in ("Train", "test") for name in CATS}
    assert counts(source(write_zip(tmp_path / "a.zip", files))) == {"train": 4, "test": 4}


def test_an_error_names_the_archive(tmp_path):
    path = write(tmp_path / "flat.zip", {"1.png": PNG, "2.png": PNG})
    with pytest.raises(UserError, match=r"the images in \S+/flat.zip have no labels"):
        source(path)


def test_two_archives_of_one_name_are_refused(tmp_path):
    write_zip(tmp_path / "cats.zip", {"1.png": PNG})
    write_tar(tmp_path / "cats.tar.gz", {"2.png": PNG})
    write_zip(tmp_path / "dogs.zip", {"3.png": PNG})
    with pytest.raises(UserError, match=r"cats.tar.gz and cats.zip in \S+ have the same name"):
        source(tmp_path)


def test_archive_beside_class_folders_is_left_out(tmp_path):
    for name, content in CATS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_zip(tmp_path / "backup.zip", {"x/1.png": PNG})
    assert open_data_set(DataConfig(dataset_name=str(tmp_path))).left_out == {".zip": 1}


def test_unpacked_once_and_again_after_a_change(tmp_path):
    path = write_zip(tmp_path / "a.zip", CATS)
    first = unpack(path)
    inode = os.stat(first / "cat/0.png").st_ino
    assert unpack(path) == first and os.stat(first / "cat/0.png").st_ino == inode
    write_zip(path, CATS | {"owl/1.png": PNG})
    second = unpack(path)
    assert second != first and (second / "owl/1.png").exists() and not first.exists()


def test_interrupted_unpacking_leaves_nothing(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", CATS)

    def stop(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stop)
        unpack(path)
    assert not list((cache_folder() / "archives").rglob("*.png"))
    assert len(list(unpack(path).rglob("*.png"))) == 4


@pytest.mark.parametrize(
    "name",
    ["../out.png", "cat/../../out.png", "/out.png", "C:\\out.png", "..\\out.png", "C:out.png"],
)
@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_members_that_lead_out_are_refused(tmp_path, name, suffix):
    path = write(tmp_path / f"a.{suffix}", CATS | {name: PNG})
    with pytest.raises(UserError, match="which points outside its folder; it was not unpacked"):
        source(path)
    assert sorted(os.listdir(tmp_path)) == ["a." + suffix, "cache"]
    assert not list((tmp_path / "cache").rglob("*.png"))


@pytest.mark.parametrize(
    "links",
    [
        [("cat/x", "../../../../x", tarfile.SYMTYPE)],
        [("cat/x", "/etc/passwd", tarfile.SYMTYPE)],
        [("cat/up", "..", tarfile.SYMTYPE), ("cat/x", "up/../../..", tarfile.SYMTYPE)],
        [("cat/x", "../../secret.png", tarfile.LNKTYPE)],
        [("cat/x", "/etc/passwd", tarfile.LNKTYPE)],
    ],
)
def test_links_that_lead_out_are_refused(tmp_path, links):
    path = write_tar(tmp_path / "a.tar", CATS, links)
    with pytest.raises(UserError, match="which points outside its folder; it was not unpacked"):
        source(path)
    assert not list((tmp_path / "cache/archives").rglob("*.png"))


def test_links_inside_are_kept(tmp_path):
    links = [
        ("cat/x.png", "../dog/0.png", tarfile.SYMTYPE),
        ("dog/y.png", "dog/0.png", tarfile.LNKTYPE),
    ]
    assert counts(source(write_tar(tmp_path / "a.tar", CATS, links))) == {"train": 6}


def test_a_link_in_a_zip_that_leads_out_is_refused(tmp_path):
    member = zipfile.ZipInfo("cat/x.png")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = write_zip(tmp_path / "a.zip", CATS | {})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(UserError, match="which points outside its folder"):
        source(path)


@pytest.mark.parametrize("suffix", ["zip", "tar.gz"])
def test_bombs_are_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(archives, "MIN_BOMB_BYTES", 2**20)
    path = write(tmp_path / f"a.{suffix}", CATS | {"cat/big.png": bytes(2**23)})
    with pytest.raises(UserError, match="unpacks to more than 100 times its size"):
        source(path)
    assert not list((tmp_path / "cache").rglob("*.png"))


def test_too_many_members_and_too_little_space_are_refused(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", CATS)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="more than 3 files"):
        patch.setattr(archives, "MAX_MEMBERS", 3)
        source(path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left to unpack"):
        patch.setattr(archives, "SPARE_BYTES", 2**60)
        source(path)


def test_encrypted_zip_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", CATS)
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.find(mark)
        while start >= 0:
            content[start + offset] |= 1
            start = content.find(mark, start + 4)
    path.write_bytes(content)
    with pytest.raises(
        UserError, match="is encrypted; unpack it with its password, and pass the folder"
    ):
        source(path)


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.xz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_damaged_archives_are_refused(tmp_path, suffix, share):
    noise = {f"{n}/{i}.png": os.urandom(2000) for n in ("cat", "dog") for i in range(20)}
    path = write(tmp_path / f"a.{suffix}", noise)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(
        UserError, match=r"a\.(zip|tar).*(cannot be unpacked|not a readable|no image)"
    ):
        source(path)


def test_archive_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.7z").write_bytes(b"7z\xbc\xaf\x27\x1c")
    with pytest.raises(
        UserError, match=r"a.7z cannot be unpacked here; unpack it, and pass the folder"
    ):
        source(tmp_path / "a.7z")


def test_names_of_other_systems(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("café/1.png", "dog\\1.png", "__MACOSX/dog/._1.png"):
            member = zipfile.ZipInfo("x")
            member.filename = name
            archive.writestr(member, PNG)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"\x00\x08", b"\x00\x00"))  # without the mark of UTF-8
    splits = source(path)
    assert splits["train"].features["label"].names == ["café", "dog"]
    assert counts(splits) == {"train": 2}


@pytest.mark.parametrize("as_file", [True, False])
def test_web_dataset_shards_are_streamed_as_before(tmp_path, as_file):
    files = {
        f"{i}.{ext}": PNG if ext == "png" else b"%d" % (i % 2)
        for i in range(4)
        for ext in ("png", "cls")
    }
    folder = tmp_path / "shards"
    folder.mkdir()
    path = write_tar(folder / "train-0.tar", files)
    data = DataConfig(dataset_name=str(path if as_file else folder), label_column_name="cls")
    rows = open_data_set(data).splits["train"]
    assert len(rows) == 4 and {"png", "cls"} <= set(rows.column_names)
    assert not (tmp_path / "cache/archives").exists()
