"""hf_cifar.hub.fetch: a cached file whose hash differs from its name is detected."""

import hashlib

import pytest

from hf_cifar.hub.fetch import discard, is_damaged


def cached(root, content, name):
    """Store a file like the Hub's client: as a link to a blob that is named by its hash."""
    (root / "blobs").mkdir(parents=True)
    (root / "blobs" / name).write_bytes(content)
    link = root / "file"
    link.symlink_to(f"blobs/{name}")
    return link


@pytest.mark.parametrize("length", [0, 1, 5 << 20])
@pytest.mark.parametrize("kind", ["git", "lfs"])
def test_one_flipped_bit_is_detected(kind, length, tmp_path):
    content = bytes(length)
    header = b"blob %d\0" % length
    name = (
        hashlib.sha1(header + content) if kind == "git" else hashlib.sha256(content)
    ).hexdigest()
    path = cached(tmp_path / "good", content, name)
    assert not is_damaged(path)
    assert is_damaged(cached(tmp_path / "bad", b"\1" + content[1:], name))
    discard(path)
    assert not path.is_symlink() and not list((tmp_path / "good/blobs").iterdir())


def test_files_without_a_known_hash_count_as_intact(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    assert not is_damaged(plain)
    assert not is_damaged(cached(tmp_path / "etag", b"x", "some-etag"))
