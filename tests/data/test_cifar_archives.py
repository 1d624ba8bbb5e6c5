import io
import pickle
import shutil
import struct
import tarfile

import numpy as np
import pytest

from hf_cifar.config.data import DataConfig
from hf_cifar.data.cifar_archives import cifar_version, read_cifar, read_pickle
from hf_cifar.data.splits import load_splits, load_test_split
from hf_cifar.errors import UserError

NAMES10 = ["airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COARSE = [f"group{i}" for i in range(20)]
FINE = [f"thing{i}" for i in range(100)]
ROWS10, ROWS100 = 10, 200


def text(value):
    """Pickle a string as SHORT_BINSTRING, as Python 2 did and as the real files contain it."""
    raw = value.encode()
    return b"U" + struct.pack("<B", len(raw)) + raw


def integers(values):
    return b"](" + b"".join(b"M" + struct.pack("<H", v) for v in values) + b"e"


def texts(values):
    return b"](" + b"".join(text(v) for v in values) + b"e"


def array(pixels):
    """Pickle a uint8 matrix as numpy did under Python 2."""
    raw = pixels.tobytes()
    rebuild = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b")
    dtype = b"cnumpy\ndtype\n" + text("u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"M" + struct.pack("<H", len(pixels)) + b"M" + struct.pack("<H", 3072) + b"\x86"
    content = b"T" + struct.pack("<i", len(raw)) + raw
    return rebuild + b"\x87R(K\x01" + shape + dtype + b"\x89" + content + b"tb"


def python2_pickle(**entries):
    items = b"".join(text(name) + value for name, value in entries.items())
    return b"\x80\x02}(" + items + b"u."


def python3_pickle(**entries):
    """Write the batch as Python 3 and a new numpy repack it."""
    return pickle.dumps({k.encode(): v for k, v in entries.items()}, protocol=2)


def draw(num_rows, seed):
    return np.random.default_rng(seed).integers(0, 256, (num_rows, 3072), dtype=np.uint8)


def cifar10_batches():
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    return {
        name: (draw(ROWS10, i), [(i + j) % 10 for j in range(10)]) for i, name in enumerate(names)
    }


def python10():
    files = {
        name: python2_pickle(
            data=array(pixels),
            labels=integers(labels),
            batch_label=text("training batch"),
            filenames=texts([f"x{i}.png" for i in range(ROWS10)]),
        )
        for name, (pixels, labels) in cifar10_batches().items()
    }
    files["batches.meta"] = python2_pickle(label_names=texts(NAMES10), num_vis=b"M\x00\x0c")
    return files | {"readme.html": b"<html>"}


def binary10():
    files = {
        f"{name}.bin": b"".join(
            bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True)
        )
        for name, (pixels, labels) in cifar10_batches().items()
    }
    return files | {"batches.meta.txt": "\n".join(NAMES10).encode() + b"\n\n"}


def cifar100_parts():
    fine = [i % 100 for i in range(ROWS100)]
    return {
        part: (draw(ROWS100, seed), fine, [f // 5 for f in fine])
        for seed, part in enumerate(("train", "test"))
    }


def python100():
    files = {
        part: python2_pickle(
            data=array(pixels), fine_labels=integers(fine), coarse_labels=integers(coarse)
        )
        for part, (pixels, fine, coarse) in cifar100_parts().items()
    }
    files["meta"] = python2_pickle(fine_label_names=texts(FINE), coarse_label_names=texts(COARSE))
    return files


def binary100():
    files = {
        f"{part}.bin": b"".join(
            bytes([c, f]) + row.tobytes() for row, f, c in zip(pixels, fine, coarse, strict=True)
        )
        for part, (pixels, fine, coarse) in cifar100_parts().items()
    }
    files["fine_label_names.txt"] = "\n".join(FINE).encode()
    return files | {"coarse_label_names.txt": "\n".join(COARSE).encode()}


def write_folder(root, files, name="cifar-10-batches-py"):
    folder = root / name
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


def write_archive(root, files, name="cifar-10-python.tar.gz"):
    with tarfile.open(root / name, "w:gz") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return root / name


def as_images(pixels):
    """Flatten [N, 32, 32, 3] as the CIFAR page specifies: 1024 red, then green, then blue, by rows."""
    images = np.empty((len(pixels), 32, 32, 3), np.uint8)
    for n, row in enumerate(pixels):
        for y in range(32):
            images[n, y] = np.stack([row[c * 1024 + y * 32 :][:32] for c in range(3)], axis=1)
    return images


WRITERS = [write_folder, write_archive]


def test_generated_python_pickles_have_the_official_format():
    """Python's own unpickler reads the tiny files like the real ones."""
    content = pickle.loads(python10()["data_batch_2"], encoding="bytes")
    pixels, labels = cifar10_batches()["data_batch_2"]
    assert (content[b"data"] == pixels).all()
    assert content[b"labels"] == labels


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("files", [python10, binary10])
def test_cifar10_in_every_form(tmp_path, files, write):
    path = write(tmp_path, files())
    assert cifar_version(path) == ("cifar10", files.__name__.removesuffix("10"))
    parts, names = read_cifar(path)
    batches = list(cifar10_batches().values())
    assert names == {"label": NAMES10}
    assert parts["train"]["label"] == [label for _, labels in batches[:5] for label in labels]
    assert (
        parts["train"]["pixels"] == as_images(np.concatenate([p for p, _ in batches[:5]]))
    ).all()
    assert (parts["test"]["pixels"] == as_images(batches[5][0])).all()
    assert parts["test"]["label"] == batches[5][1]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("files", [python100, binary100])
def test_cifar100_in_every_form(tmp_path, files, write):
    path = write(tmp_path, files())
    assert cifar_version(path) == ("cifar100", files.__name__.removesuffix("100"))
    parts, names = read_cifar(path)
    assert names == {"fine_label": FINE, "coarse_label": COARSE}
    for part, (pixels, fine, coarse) in cifar100_parts().items():
        assert (parts[part]["pixels"] == as_images(pixels)).all()
        assert parts[part]["fine_label"] == fine
        assert parts[part]["coarse_label"] == coarse


@pytest.mark.parametrize("order", ["C", "F"])
def test_batch_repacked_by_python_3(tmp_path, order):
    files = python10()
    pixels, labels = cifar10_batches()["data_batch_1"]
    files["data_batch_1"] = python3_pickle(data=np.asarray(pixels, order=order), labels=labels)
    parts, _ = read_cifar(write_folder(tmp_path, files))
    assert (parts["train"]["pixels"][:ROWS10] == as_images(pixels)).all()


@pytest.mark.parametrize("files", [python10, binary10])
def test_archive_is_loaded_through_the_data_options(tmp_path, files):
    data = DataConfig(dataset_name=str(write_archive(tmp_path, files())))
    splits = load_splits(data)
    test = load_test_split(data)
    assert splits.id2label == dict(enumerate(NAMES10))
    assert (len(splits.train), len(splits.validation), len(test)) == (40, 10, 10)
    everything = np.concatenate([pixels for pixels, _ in cifar10_batches().values()])
    assert (splits.train.pictures("") == as_images(everything[splits.train.row_ids])).all()
    assert (test.pictures("") == as_images(everything[-ROWS10:])).all()


def test_cifar100_requires_a_choice_of_labels(tmp_path):
    path = str(write_archive(tmp_path, python100()))
    with pytest.raises(
        UserError, match=r"\['fine_label', 'coarse_label'\]; choose one with --label_column_name"
    ):
        load_splits(DataConfig(dataset_name=path))
    splits = load_splits(DataConfig(dataset_name=path, label_column_name="coarse_label"))
    assert splits.id2label == dict(enumerate(COARSE))


def test_other_folders_and_files_are_not_cifar(tmp_path):
    (tmp_path / "train").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    assert cifar_version(tmp_path) is None
    assert cifar_version(tmp_path / "notes.txt") is None


class Reduce:
    """Pickled as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def global_call(module, name, argument):
    """Write a protocol 0 pickle that calls module.name(argument), by hand, since the module may not exist."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def payloads(canary):
    import os
    import subprocess

    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"
    return {
        "os.system": pickle.dumps(Reduce(os.system, touch), protocol=2),
        "posix.system": global_call("posix", "system", touch),
        "subprocess": pickle.dumps(Reduce(subprocess.check_output, ["touch", str(canary)]), 2),
        "eval": pickle.dumps(Reduce(eval, code), protocol=2),
        "exec": pickle.dumps(Reduce(exec, code), protocol=4),
        "python 2 eval": global_call("__builtin__", "eval", code),
        "python 2 execfile": global_call("__builtin__", "execfile", canary),
        "nested in data": pickle.dumps({b"data": Reduce(eval, code), b"labels": []}, protocol=2),
        "numpy.save": pickle.dumps(Reduce(np.save, str(canary), [1]), protocol=2),
        "numpy.fromfile": global_call("numpy", "fromfile", canary),
        "numpy.load": global_call("numpy", "load", canary),
        "numpy.testing": global_call("numpy.testing._private.utils", "runstring", code),
        "numpy exec_command": global_call("numpy.distutils.exec_command", "exec_command", touch),
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93\x8c\x01x\x85R.",
        "getattr": global_call("builtins", "getattr", "x"),
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pevil\n.",
    }


@pytest.mark.parametrize("name", payloads("canary"))
def test_malicious_pickles_execute_nothing(tmp_path, name):
    canary = tmp_path / "canary"
    payload = payloads(canary)[name]
    with pytest.raises(UserError, match="batch"):
        read_pickle(io.BytesIO(payload), "data_batch_1")
    for target in ("data_batch_3", "batches.meta", "test_batch"):
        folder = write_folder(tmp_path, python10() | {target: payload}, f"in_{target}")
        with pytest.raises(UserError, match=target):
            read_cifar(folder)
    assert not list(tmp_path.glob("canary*"))


def test_payloads_are_effective_with_plain_pickle(tmp_path):
    """Guard of the test above: the plain unpickler does create the canary."""
    canary = tmp_path / "canary"
    pickle.loads(payloads(canary)["eval"])
    assert canary.exists()


def test_inert_records_cannot_be_called_into_objects():
    """BUILD on a numpy name sets a record's state: it writes no attribute and no class."""
    evil = b"\x80\x02cnumpy\nndarray\n)\x81}U\x08__dict__U\x01xsb."
    with pytest.raises(UserError, match="holds a _Record"):
        read_pickle(io.BytesIO(evil), "data_batch_1")
    assert isinstance(read_pickle(io.BytesIO(pickle.dumps({}, 2)), "meta"), dict)


def test_build_on_a_safe_name_does_not_change_it():
    """A pickle may give state to the class itself; the next batch must not notice."""
    poison = b"\x80\x02}U\x04datacnumpy\nndarray\n}U\x0c__setstate__U\x01xsbs."
    with pytest.raises(UserError):
        read_pickle(io.BytesIO(poison), "data_batch_1")
    good = read_pickle(io.BytesIO(python10()["data_batch_1"]), "data_batch_1")
    assert good[b"labels"] == cifar10_batches()["data_batch_1"][1]


def replace(files, **changes):
    return files | {name.replace("__", "."): content for name, content in changes.items()}


PIXELS = array(draw(ROWS10, 0))
BAD10 = {
    "cut": (lambda f: replace(f, data_batch_2=f["data_batch_2"][:500]), "is not a readable CIFAR"),
    "list": (lambda f: replace(f, data_batch_2=pickle.dumps([1], 2)), "holds a list"),
    "no pixels": (
        lambda f: replace(f, data_batch_2=python2_pickle(labels=integers([0]))),
        "no pixel array under 'data'",
    ),
    "no labels": (
        lambda f: replace(f, data_batch_2=python2_pickle(data=PIXELS)),
        "no list of integers under 'labels'",
    ),
    "fewer labels": (
        lambda f: replace(f, data_batch_2=python2_pickle(data=PIXELS, labels=integers([1, 2]))),
        "10 images, but 2 values of label",
    ),
    "half a row": (
        lambda f: replace(
            f, data_batch_2=python2_pickle(data=array(draw(1, 0)[:, :99]), labels=integers([1]))
        ),
        "99 bytes of pixels, not a multiple of 3072",
    ),
    "label 12": (
        lambda f: replace(f, data_batch_2=python2_pickle(data=PIXELS, labels=integers([12] * 10))),
        "a label is not one of the 10 class names",
    ),
    "no names": (lambda f: replace(f, batches__meta=python2_pickle(x=text("y"))), "no class names"),
    "missing": (lambda f: {k: f[k] for k in f if k != "data_batch_4"}, "data_batch_4 is missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD10)
def test_damaged_python_version_is_a_clear_error(tmp_path, fault):
    change, message = BAD10[fault]
    with pytest.raises(UserError, match=message):
        read_cifar(write_folder(tmp_path, change(python10())))


def test_damaged_binary_version_is_a_clear_error(tmp_path):
    cut = write_folder(tmp_path, binary10() | {"data_batch_1.bin": bytes(100)}, "cut")
    with pytest.raises(UserError, match="100 bytes, not a multiple of 3073; download it again"):
        read_cifar(cut)
    empty = write_folder(tmp_path, binary10() | {"test_batch.bin": b""}, "empty")
    with pytest.raises(UserError, match=r"test_batch.bin: 0 bytes"):
        read_cifar(empty)
    files = binary100()
    del files["coarse_label_names.txt"]
    with pytest.raises(UserError, match=r"coarse_label_names.txt is missing"):
        read_cifar(write_folder(tmp_path, files, "names"))


def test_truncated_archive_is_a_user_error(tmp_path):
    path = write_archive(tmp_path, python10())
    for share in (0.2, 0.6, 0.99):
        cut = tmp_path / f"cut{share}.tar.gz"
        shutil.copy(path, cut)
        with open(cut, "r+b") as stream:
            stream.truncate(int(path.stat().st_size * share))
        with pytest.raises(UserError, match=r"cut.*tar"):
            load_splits(DataConfig(dataset_name=str(cut)))


def test_file_that_is_not_an_archive_is_refused(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match="not a readable tar archive"):
        load_splits(DataConfig(dataset_name=str(path)))
    other = tmp_path / "data.csv"
    other.write_text("a,b")
    with pytest.raises(UserError, match=r"data.csv has no rows"):
        load_splits(DataConfig(dataset_name=str(other)))
    notes = tmp_path / "notes.txt"
    notes.write_text("a,b")
    with pytest.raises(UserError, match=r"notes.txt is not a data set; pass a folder of images"):
        load_splits(DataConfig(dataset_name=str(notes)))
