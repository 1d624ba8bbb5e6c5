"""A demo in a process of its own, in an environment that has Gradio, and a client of its pages."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = "HF_CIFAR_DEMO_PYTHON"  # names the Python of that environment, see CONTRIBUTING.md
READY_SECONDS = 180
DEMO = "from hf_cifar.cli import run; run()"
SPACE = """
sys.modules["hf_cifar"] = None  # an import fails
import runpy; runpy.run_path("app.py", run_name="__main__")
"""
# Notes each connection and each name that is looked up, except of this machine.
WATCH = """
import os, sys
def watch(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "127.0.0.1", "::1", "localhost"):
        with open(os.environ["WATCH_LOG"], "a") as file:
            print(event, host, file=file)
sys.addaudithook(watch)
"""
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n%s\r\n"
)


def demo_python():
    """Return the Python to run demos with; skips the test if there is none."""
    if importlib.util.find_spec("gradio") is not None:
        return sys.executable
    if PYTHON not in os.environ:
        pytest.skip(f"no Gradio; name the Python of an environment that has it in {PYTHON}")
    return os.environ[PYTHON]


def demo_environment(**variables):
    """Return the environment of a process that runs the package of this clone."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "NO_PROXY": "127.0.0.1", **variables}


def run_demo(*arguments, env=None):
    """Run a command line of `hf-cifar demo` that ends; return the finished process."""
    return subprocess.run(
        [demo_python(), "-c", DEMO, "demo", *map(str, arguments)],
        capture_output=True, text=True, env=env or demo_environment(), timeout=300,
    )  # fmt: skip


class Page:
    """A running demo. log: what it prints; fetched: connections to other machines."""

    def __init__(self, folder, code, *arguments, cwd=None, **variables):
        self.log, self._watched = Path(folder, "demo.log"), Path(folder, "fetched")
        env = demo_environment(WATCH_LOG=str(self._watched), **variables)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [demo_python(), "-u", "-c", WATCH + code, *map(str, arguments)],
                stdout=log, stderr=log, env=env, cwd=cwd,
            )  # fmt: skip

    def wait(self):
        """Wait until it answers."""
        end = time.monotonic() + READY_SECONDS
        while not (
            found := re.search(r"(?:is at|local URL:)\s+http://\S+:(\d+)", self.log.read_text())
        ):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)
        self.port = int(found[1])
        return self

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/"

    @property
    def fetched(self):
        return self._watched.read_text().splitlines() if self._watched.exists() else []

    def call(self, method, path, body=None, **headers):
        """Send a request whose path is not changed; return status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.putrequest(method, path)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            if body is not None and "Transfer_Encoding" not in headers:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders()
            with contextlib.suppress(ConnectionError):  # the answer may come before all is sent
                connection.send(body or b"")
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def upload(self, *images, name=b"image.png"):
        """Upload files; return status and body, a list of their paths."""
        body = b"".join(FORM % (name, image) for image in images) + b"--b--\r\n"
        kind = "multipart/form-data; boundary=b"
        return self.call("POST", "/gradio_api/upload", body, Content_Type=kind)

    def predict(self, path, *more):
        """Return the outputs for a path on the server, or None if it failed or was refused."""
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        status, body = self.send({"data": [file, *more]})
        if status != 200:
            return None
        event = json.loads(body)["event_id"]
        _, stream = self.call("GET", f"/gradio_api/call/predict/{event}")
        found = re.search(rb"event: complete\ndata: (.*)", stream)
        return json.loads(found[1]) if found else None

    def send(self, event, route="/gradio_api/call/predict"):
        return self.call("POST", route, json.dumps(event).encode(), Content_Type="application/json")

    def answer(self, image, *more):
        """Upload an image, and return the outputs for it."""
        status, body = self.upload(image)
        assert status == 200, body
        return self.predict(json.loads(body)[0], *more)

    def stop(self):
        """End it, and return the exit status."""
        self.process.terminate()
        return self.process.wait(60)


@contextlib.contextmanager
def page_of(folder, code, *arguments, cwd=None, **variables):
    """Start a page, and end it."""
    page = Page(folder, code, *arguments, cwd=cwd, **variables)
    try:
        yield page.wait()
    finally:
        page.process.kill()
        page.process.wait()


def space_page(folder, space):
    """Start a written Space, without hf_cifar. Gradio takes no port 0."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    variables = {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(Path(folder, "uploads"))}
    return page_of(folder, SPACE, cwd=space, **variables)


def showing(folder, *arguments, **variables):
    """Start `hf-cifar demo` at any free port."""
    return page_of(folder, DEMO, "demo", *arguments, "--use_cpu", "--port", "0", **variables)


def scores_of(label):
    """Return the scores by label of an output with bars."""
    return {each["label"]: each["confidence"] for each in label["confidences"]}
