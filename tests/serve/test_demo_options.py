"""Mistakes in a command line of hf-cifar demo, found without Gradio; and the guard of its pages."""

import json

import pytest

from hf_cifar.cli import main
from hf_cifar.config.serving import DemoConfig
from hf_cifar.serve.guard import EVENT_BYTES, FORM_BYTES, HEADERS, Guard

MAX_BYTES = 5000


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached from other machines"),
        (["--push", "me/demo"], "--push needs --space FOLDER"),
        (["--private", "false"], "--private needs --space FOLDER"),
        (["--space", "new", "--port", "80"], "--port has no effect with --space"),
        (["--num_examples", "-1"], "--num_examples is -1"),
        (["other", "third"], "demo takes one model, or two different ones; leave out third"),
    ],
)
def test_mistakes(capsys, tiny_vit, flags, problem):
    assert main(["demo", str(tiny_vit), *flags]) == 2
    assert problem in capsys.readouterr().err


def test_model_must_exist(capsys):
    assert main(["demo", "no/such/run"]) == 2
    assert "no/such/run" in capsys.readouterr().err
    assert main(["demo"]) == 2
    assert "--model_name_or_path is missing" in capsys.readouterr().err


def test_key_of_the_environment_is_no_mistake_of_a_space(monkeypatch):
    monkeypatch.setenv("HF_CIFAR_API_KEY", "0123456789abcdef")
    assert DemoConfig(space="new").space == "new"


def asked(method, path, body=b"", length=None):
    """Ask a guarded application that answers 200; return the status, its headers, and what it received."""
    received, sent = [], []

    async def app(scope, receive, send):
        if method == "POST":
            received.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    parts = [
        {"type": "http.request", "body": body[:10], "more_body": True},
        {"type": "http.request", "body": body[10:], "more_body": False},
    ]

    async def receive():
        return parts.pop(0)

    async def send(message):
        sent.append(message)

    given = str(len(body)) if length is None else length
    scope = {
        "type": "http", "method": method, "path": path,
        "headers": [(b"content-length", given.encode())],
    }  # fmt: skip
    # Nothing waits, so that no event loop is needed; one may run already, that of a browser.
    with pytest.raises(StopIteration):
        Guard(app, MAX_BYTES)(scope, receive, send).send(None)
    return sent[0]["status"], sent[0]["headers"], b"".join(received)


def event(path, **more):
    return json.dumps({"data": [{"path": path, **more}, False]}).encode()


JOIN = "/gradio_api/queue/join"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (event("/tmp/gradio/ab/image.png"), 200),
        (event("C:\\Temp\\image.png"), 200),
        (event("/tmp/image.png", url="http://127.0.0.1/gradio_api/file=/tmp/image.png"), 200),
        (event("http://example.com/a.png"), 403),
        (event(" HTTPS://example.com/a.png"), 403),
        (event("file:///etc/passwd"), 403),
        (event("//host/share"), 403),
        (event("\\\\host\\share"), 403),
        (event({"deep": ["ftp://example.com"]}), 403),
        (b"username=a&password=b", 200),
        (b"[" * 100_000, 200),
    ],
)
def test_events_that_name_a_url_are_refused(body, status):
    found, headers, received = asked("POST", JOIN, body)
    assert found == status
    assert received == (body if status == 200 else b"")
    assert set(HEADERS) <= set(headers)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/gradio_api/file=/tmp/gradio/image.png", 200),
        ("/gradio_api/file=http://example.com", 403),
        ("/gradio_api/file/https://example.com", 403),
        ("/gradio_api/file=//host/share", 403),
        ("/gradio_api/proxy=https://example.hf.space/", 403),
    ],
)
def test_paths_that_name_a_url_are_refused(path, status):
    assert asked("GET", path)[0] == status


def test_sizes():
    upload = "/gradio_api/upload"
    assert asked("POST", upload, length=str(MAX_BYTES + FORM_BYTES))[0] == 200
    assert asked("POST", upload, length=str(MAX_BYTES + FORM_BYTES + 1))[0] == 413
    assert asked("POST", upload, length="")[0] == 411
    assert asked("POST", JOIN, length=str(EVENT_BYTES + 1))[0] == 413
