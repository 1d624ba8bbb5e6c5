"""hf_cifar.hub.fetch: damaged files are detected; a mirror may send ETags that are no hash of the Hub's."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import FLIP, Hub, hub_environment

from hf_cifar.hub.fetch import discard, etag_of, matches

CONTENT = b"many weights: " * 1000
WEIGHTS = CONTENT[::-1]
# One file from the server, in a process of its own: the client reads its environment when it is imported.
FETCH = """
import json, logging, sys
from hf_cifar.errors import UserError
from hf_cifar.hub.fetch import fetch
notes = []
handler = logging.Handler()
handler.emit = lambda record: notes.append(record.getMessage())
logging.getLogger("hf_cifar").addHandler(handler)
found = []
for file in sys.argv[1:]:
    try:
        found.append(fetch("me/model", file).read_bytes().hex())
    except UserError as error:
        found.append(str(error))
print(json.dumps([found, notes]))
"""


def fetch(hub, home, *files, offline=False):
    """The content of files or an error each, warnings, and the number of downloads."""
    before = len(hub.requests)
    environment = hub_environment(home, hub.endpoint) | {"HF_HUB_OFFLINE": str(int(offline))}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", FETCH, *files], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, notes = json.loads(done.stdout.splitlines()[-1])
    downloads = [r for r in hub.requests[before:] if r.startswith("GET") and "/resolve/" in r]
    return [each if " " in each else bytes.fromhex(each) for each in found], notes, len(downloads)


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.txt").write_bytes(CONTENT)
    (folder / "b.safetensors").write_bytes(WEIGHTS)
    with Hub() as hub:
        hub.fill("models", "me/model", folder)
        yield hub


HASHES = {
    "plain SHA-1": lambda c: f'"{hashlib.sha1(c).hexdigest()}"',
    "weak SHA-1": lambda c: f'W/"{hashlib.sha1(c).hexdigest()}"',
    "unquoted": lambda c: hashlib.sha1(c).hexdigest(),
    "MD5": lambda c: f'"{hashlib.md5(c).hexdigest()}"',
    "SHA-256": lambda c: f'"{hashlib.sha256(c).hexdigest()}"',
    "upper case": lambda c: f'"{hashlib.sha256(c).hexdigest().upper()}"',
    "named": lambda c: '"{SHA1{' + hashlib.sha1(c).hexdigest() + '}}"',
    "compressed": lambda c: f'W/"{hashlib.md5(c).hexdigest()}-gzip"',
}
# No hash of the content: of parts, of the time, of a name, in base 64.
OTHERS = {
    "parts": lambda c: f'"{hashlib.md5(hashlib.md5(c).digest()).hexdigest()}-7"',
    "time": lambda c: f'W/"67f1-{sum(c):x}{c[0]}"',
    "other SHA-1": lambda c: f'"{hashlib.sha1(b"name" + c).hexdigest()}"',
    "other SHA-256": lambda c: f'"{hashlib.sha256(b"name" + c).hexdigest()}"',
    "odd": lambda c: f'"0x8DC{c[0]}"',
}


@pytest.mark.parametrize("kind", HASHES)
def test_a_mirror_may_send_any_known_hash(kind, hub, tmp_path):
    hub.etag = HASHES[kind]
    hub.refused["listing", "me/model"] = 404  # nothing but the ETag
    hub.faults["download", "me/model/b.safetensors"] = [FLIP]  # is damaged once
    found = fetch(hub, tmp_path / "home", "a.txt", "b.safetensors")
    assert found == ([CONTENT, WEIGHTS], [], 3)


@pytest.mark.parametrize("kind", OTHERS)
def test_another_etag_is_checked_with_the_listing(kind, hub, tmp_path):
    hub.etag = OTHERS[kind]
    home = tmp_path / "home"
    assert fetch(hub, home, "b.safetensors") == ([WEIGHTS], [], 1)
    assert fetch(hub, home, "b.safetensors", offline=True) == ([WEIGHTS], [], 0)
    hub.faults["download", "me/model/b.safetensors"] = [FLIP] * 2
    (error,), notes, downloads = fetch(hub, tmp_path / "new", "b.safetensors")
    assert "was damaged in two downloads" in error and (notes, downloads) == ([], 2)


@pytest.mark.parametrize("kind", OTHERS)
def test_without_any_hash_two_identical_downloads_count(kind, hub, tmp_path):
    hub.etag = OTHERS[kind]
    hub.refused["listing", "me/model"] = 404
    home = tmp_path / "home"
    files = "a.txt", "b.safetensors"
    found, notes, downloads = fetch(hub, home, *files)
    assert (found, downloads) == ([CONTENT, WEIGHTS], 4)
    assert len(notes) == 1 and hub.endpoint in notes[0]
    for offline in (False, True):  # remembered
        assert fetch(hub, home, *files, offline=offline) == ([CONTENT, WEIGHTS], [], 0)
    hub.faults["download", "me/model/a.txt"] = [FLIP]
    (error,), _, downloads = fetch(hub, tmp_path / "new", "a.txt")
    assert "was damaged in two downloads" in error and downloads == 2


@pytest.mark.parametrize("file", ["a.txt", "b.safetensors"])
def test_what_the_hub_serves_is_verified(file, hub, tmp_path):
    hub.faults["download", f"me/model/{file}"] = [FLIP] * 2
    (error,), notes, _ = fetch(hub, tmp_path / "home", file)
    assert "was damaged in two downloads" in error and not notes
    assert fetch(hub, tmp_path / "home", file)[0] in ([CONTENT], [WEIGHTS])


def cached(root, content, name):
    """Store a file like the Hub's client: as a link to a blob that is named by its ETag."""
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
    assert etag_of(path) == name and matches(path, name)
    assert not matches(cached(tmp_path / "bad", b"\1" + content[1:], name), name)
    discard(path)
    assert not path.is_symlink() and not list((tmp_path / "good/blobs").iterdir())


def test_a_cache_without_links_has_no_etag(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"x")
    assert etag_of(plain) is None
