"""A server in a process of its own, as a user starts it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from benchmarks.load import form

READY_SECONDS = 180
COMMAND = [sys.executable, "-c", "from hf_cifar.cli import run; run()", "serve"]


class Server:
    """A running server. log: its standard error; requests: its standard output."""

    def __init__(self, folder, model, *flags, env=None):
        self.log, self.requests = Path(folder, "log"), Path(folder, "requests")
        with self.log.open("w") as log, self.requests.open("w") as requests:
            self.process = subprocess.Popen(
                [*COMMAND, str(model), "--use_cpu", *("--port", "0") * ("--port" not in flags), *flags],
                stdout=requests, stderr=log, env={**os.environ, **(env or {})},
            )  # fmt: skip
        self.key = None

    def wait(self):
        """Wait until it serves."""
        end = time.monotonic() + READY_SECONDS
        while not (found := re.search(r" at http://\S+:(\d+);", self.log.read_text())):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)
        self.port = int(found[1])
        return self

    @property
    def front(self):
        return psutil.Process(self.process.pid)

    @property
    def workers(self):
        return self.front.children()

    def call(self, path, body=None, content_type="application/octet-stream", **headers):
        """Send a request; return status, headers and body."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=body)
        if body is not None:
            request.add_header("Content-Type", content_type)
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def get(self, path, **headers):
        """Return the JSON of a page."""
        status, _, body = self.call(path, **headers)
        assert status == 200, body
        return json.loads(body)

    def metric(self, name):
        """Return the value of a metric, given with its labels; 0 if it does not exist yet."""
        text = self.call("/metrics")[2].decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def logged(self):
        """Return the requests in its log."""
        return [json.loads(line) for line in self.requests.read_text().splitlines()]

    def stop(self, number=signal.SIGTERM):
        """Send a signal, and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def kill(self):
        with contextlib.suppress(psutil.Error):
            for worker in self.workers:
                worker.kill()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def serving(folder, model, *flags, env=None):
    """Start a server, and end it."""
    server = Server(folder, model, *flags, env=env)
    try:
        yield server.wait()
    finally:
        server.kill()


def forms(*images):
    """Return the body and the content type of a form with these files."""
    parts = [form(image)[0] for image in images]
    end = parts[0][parts[0].rindex(b"\r\n--") :]
    content_type = form(images[0])[1]
    return b"\r\n".join(part.removesuffix(end) for part in parts) + end, content_type
