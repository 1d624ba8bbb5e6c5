"""The demo when a client asks for files of the machine, for pages elsewhere, or sends too much."""

import json
from urllib.parse import quote

import pytest
from demo_page import showing
from tiny import tiny_run

SECRET = b"a secret of this machine"
LARGEST = 100_000


@pytest.fixture(scope="module")
def run(tmp_path_factory, stripes, tiny_vit):
    folder = tmp_path_factory.mktemp("run") / "run"
    tiny_run(folder, stripes, tiny_vit)
    (folder / "secret.png").write_bytes(SECRET)
    return folder


@pytest.fixture
def page(tmp_path, run):
    (tmp_path / "temporary").mkdir()
    limits = ("--max_bytes", LARGEST)
    with showing(tmp_path, run, *limits, TMPDIR=str(tmp_path / "temporary")) as running:
        yield running


def traversals(targets):
    """Return 50 ways to name files that were not uploaded."""
    found = []
    for target in targets:
        up = "/.." * 12 + target
        found += [
            target, f"/{target}", f"/.{target}", f"{target}/.", f".{up}", f"static{up}", f"assets{up}",
            f"/tmp{up}", up.replace("..", "%2e%2e"), up.replace("/", "%2f"), up.replace("/", "\\"),
            up.replace("..", "....//"), up.replace("..", "%252e%252e"), f"{target}%00.png",
            f"file://{target}", f"file:{target}", f"~{target}",
        ]  # fmt: skip
    return found[:50]


def test_traversal_urls_and_oversize(page, run, tmp_path, stripes, record_result):
    targets = [str(run / "secret.png"), str(run / "config.yaml"), "/etc/passwd"]
    contents = [(run / "config.yaml").read_bytes(), SECRET, b"root:"]
    picture = next((stripes / "test" / "down").glob("*.png")).read_bytes()
    passed = 0
    for path in traversals(targets):
        answers = [
            page.call("GET", f"/gradio_api/{route}{quote(path, safe='/%.~:')}")
            for route in ("file=", "file/", "stream/")
        ]
        answers += [
            page.call("GET", f"/{route}/{quote(path, safe='/%.~:')}")
            for route in ("static", "assets")
        ]
        answers.append(page.upload(picture, name=path.encode()))
        leaked = any(content in body for _, body in answers for content in contents)
        predicted = page.predict(path, False) is not None
        passed += not leaked and not predicted
    assert (run / "secret.png").read_bytes() == SECRET
    record_result(
        32, "demo: paths of files that were not uploaded, in addresses, events and names of uploads",
        "no file leaked, none overwritten", passed, 50,
    )  # fmt: skip


def test_nothing_is_fetched(page, record_result):
    hosts = (
        "example.com/a.png",
        "93.184.215.14/a.png",
        "127.0.0.1:1/a.png",
        "localhost:1/a",
        "[::1]:1/a",
    )
    urls = [f"{scheme}://{host}" for host in hosts for scheme in ("http", "HTTPS", "ftp", "file")]
    passed = 0
    for url in urls:
        file = {"path": url, "url": url, "meta": {"_type": "gradio.FileData"}}
        answers = [
            page.call("GET", f"/gradio_api/file={url}"),
            page.call("GET", f"/gradio_api/proxy={url}"),
            page.send({"data": [file, False]}),
            page.send({"data": [None, file]}),
            page.send({"picture": file, "image": file}, "/gradio_api/call/v2/predict"),
            page.send(
                {"data": [file, False], "fn_index": 0, "session_hash": "a"},
                "/gradio_api/queue/join",
            ),
        ]
        passed += all(status == 403 for status, _ in answers)
    assert page.fetched == []
    record_result(
        32, "demo: URLs in place of files", "refused; nothing is fetched", passed, len(urls)
    )


def test_oversize(page, tmp_path, record_result):
    def stored():
        return sum(
            each.stat().st_size for each in (tmp_path / "temporary").rglob("*") if each.is_file()
        )

    before = stored()
    large = b"0" * (LARGEST + 5000)
    pieces = b"%x\r\n%s\r\n0\r\n\r\n" % (len(large), large)
    chunked = {"Transfer_Encoding": "chunked", "Content_Type": "multipart/form-data; boundary=b"}
    statuses = [
        page.upload(large)[0],
        page.upload(large[: LARGEST // 2], large[: LARGEST // 2 + 5000])[0],
        page.upload(*[large[:1000]] * 200)[0],
        page.call("POST", "/gradio_api/upload", pieces, **chunked)[0],
        page.send({"data": ["0" * 2**20, False]})[0],
        page.send({"data": ["0" * 2**20]}, "/gradio_api/queue/join")[0],
    ]
    assert stored() == before
    assert json.loads(page.upload(b"0" * LARGEST)[1])  # the largest that is taken
    passed = sum(status in (411, 413) for status in statuses)
    record_result(32, "demo: too large uploads and events", "refused; nothing stored", passed, 6)
