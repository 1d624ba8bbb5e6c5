"""hf_cifar.runs.parts: a table in parts that are complete or absent."""

import errno
import json

import filelock
import pyarrow
import pytest
from pyarrow import parquet

from hf_cifar.errors import UserError
from hf_cifar.runs import parts as module
from hf_cifar.runs.parts import Parts


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", 4)


def table_of(rows, errors=()):
    values = ["bad" if row in errors else None for row in rows]
    columns = {"row_id": list(rows), "error": pyarrow.array(values, pyarrow.string())}
    return pyarrow.table(columns)


def write_all(parts, **options):
    for number in parts.claim(parts.missing(**options)):
        parts.write(number, table_of(parts.rows(number), errors=(5,)))


def begun(folder, **settings):
    parts = Parts(folder, 10, {"model": "a", **settings})
    parts.begin()
    return parts


def test_a_table_is_written_checked_and_read_as_one(tmp_path):
    parts = begun(tmp_path / "new" / "out")
    assert parts.missing() == [0, 1, 2] and parts.missing(1, 2) == [1]
    write_all(parts)
    manifest = parts.finish({"who": "me"})
    expected = {
        "who": "me", "model": "a", "num_rows": 10, "part_rows": 4, "parts": 3, "num_errors": 1,
    }  # fmt: skip
    assert manifest == expected == json.loads(parts.manifest_path.read_text())
    assert parquet.read_table(parts.folder)["row_id"].to_pylist() == list(range(10))
    names = [f"part-{n:05}-of-00003.parquet" for n in range(3)]
    assert sorted(p.name for p in parts.folder.iterdir()) == [
        "_manifest.json",
        "_settings.json",
        *names,
    ]
    again = begun(parts.folder)
    assert again.missing() == []
    assert again.finish({"who": "me"}) == expected


def test_a_claimed_part_is_left_to_its_process(tmp_path):
    one, two = begun(tmp_path), begun(tmp_path)
    claims = one.claim(one.missing())
    assert next(claims) == 0
    assert next(two.claim(two.missing())) == 1
    assert next(claims) == 2
    one.release()
    write_all(two)
    assert one.missing() == [1]  # still claimed by the first claim of `two`
    two.release()
    write_all(one)
    assert one.missing() == []


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, *, blocking):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock, "lock_descriptor", refuse)
    parts = begun(tmp_path)
    write_all(parts)
    assert parts.finish({})["num_rows"] == 10
    assert caplog.text.count("pass --shard, or processes may predict the same parts") == 1


def test_other_settings_and_other_files_are_refused(tmp_path):
    write_all(begun(tmp_path / "out"))
    with pytest.raises(UserError, match=r"has a different model \(a there, b now\); use the same"):
        begun(tmp_path / "out", model="b")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(UserError, match="holds other files; pass a new folder"):
        begun(tmp_path / "other")
    with pytest.raises(UserError, match="is a file; pass a folder"):
        begun(tmp_path / "other" / "file")
    with pytest.raises(UserError, match="cannot write"):
        begun(tmp_path / "other" / "file" / "below")


DAMAGE = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "is damaged"),
    "of another program": (lambda path: parquet.write_table(table_of(range(4, 8)), path), "is damaged"),
    "of another part": (lambda path: path.write_bytes(_first(path).read_bytes()), "rows 4 to 7, each once"),
}  # fmt: skip


def _first(path):
    return path.with_name("part-00000-of-00003.parquet")


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_part_is_named(name, tmp_path):
    damage, message = DAMAGE[name]
    parts = begun(tmp_path)
    write_all(parts)
    damage(parts.path(1))
    with pytest.raises(UserError, match=message):
        parts.finish({})
    assert not parts.manifest_path.exists()
    parts.path(1).unlink()
    write_all(parts)
    assert parts.finish({})["parts"] == 3


def test_rows_of_a_part_that_are_there_twice_are_found(tmp_path):
    parts = begun(tmp_path)
    for number in parts.claim(parts.missing()):
        rows = parts.rows(number)
        parts.write(number, table_of([*rows[:-1], rows[0]]))
    with pytest.raises(UserError, match="does not hold the rows 0 to 3, each once"):
        parts.finish({})
