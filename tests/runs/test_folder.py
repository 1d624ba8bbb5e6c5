"""hf_cifar.runs.folder: a new folder appears whole, in place of an earlier one, or not at all."""

import pytest

from hf_cifar.errors import UserError
from hf_cifar.runs.folder import new_folder


def fill(path, text):
    with new_folder(path) as folder:
        assert not list(folder.iterdir())
        (folder / "page").write_text(text)


def test_a_folder_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "parent" / "out"
    with new_folder(path) as folder:
        (folder / "page").write_text("first")
        assert not path.exists() and folder.parent == path.parent
    fill(path, "second")
    assert (path / "page").read_text() == "second"
    with pytest.raises(KeyboardInterrupt), new_folder(path) as folder:
        (folder / "other").write_text("half")
        raise KeyboardInterrupt
    assert [each.name for each in path.iterdir()] == ["page"]
    assert [each.name for each in path.parent.iterdir()] == ["out"]


def test_links_and_the_current_folder_are_followed(tmp_path, monkeypatch):
    target, link = tmp_path / "disk", tmp_path / "out"
    target.mkdir()
    link.symlink_to(target)
    fill(link, "linked")
    assert link.is_symlink() and (target / "page").read_text() == "linked"
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with new_folder(here / "sub" / "..") as folder:
        (folder / "page").write_text("here")
    assert (here / "page").read_text() == "here"


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path, message in (
        (file, "is a file"), (file / "out", "cannot write .*pass another --output_dir"),
        ("/", "the root of a file system"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            fill(file.__class__(path), "x")
    assert file.read_text() == ""
