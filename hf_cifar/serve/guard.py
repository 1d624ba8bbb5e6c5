"""A wrapper of the demo's pages that keeps them on this machine, and limits the size of requests."""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

UPLOAD = "/gradio_api/upload"
FORM_BYTES = 2**12  # of a form around its file
EVENT_BYTES = 2**18  # of any other request, which names uploaded files
URL = re.compile(r"\s*([a-z][a-z0-9+.-]+:|//|\\\\)", re.IGNORECASE)  # no drive, such as C:
# Gradio can fetch, as a proxy or in place of an uploaded file, what a client names.
FETCHED = re.compile(r"/gradio_api/(proxy=|file[=/]\s*([a-z][a-z0-9+.-]+:|//|\\\\))", re.IGNORECASE)
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class Guard:
    """Answers 403 to a request that names a URL for the server to fetch, and 413 to a large one; a policy
    forbids the browser to load anything from elsewhere."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_more(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        async def refuse(status: int, problem: str) -> None:
            await JSONResponse({"error": problem}, status)(scope, receive, send_more)

        if FETCHED.match(scope["path"]):
            await refuse(403, "only uploaded files are read")
            return
        if scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send_more)
            return
        is_upload = scope["path"].rstrip("/") == UPLOAD
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            await refuse(411, "send the length of the request")
        elif int(length) > (most := self._max_bytes + FORM_BYTES if is_upload else EVENT_BYTES):
            await refuse(413, f"the request is larger than {most:,} bytes")
        elif is_upload:
            await self._app(scope, receive, send_more)
        else:
            await self._check_event(scope, receive, send_more, refuse)

    async def _check_event(self, scope: Scope, receive: Receive, send: Send, refuse: Any) -> None:
        """Read a request that names its files, and pass it on unless it names a URL."""
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        try:
            names_url = _names_url(json.loads(body))
        except (ValueError, RecursionError):
            names_url = False  # a form of the login, or refused by its route
        if names_url:
            await refuse(403, "only uploaded files are read")
            return
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return parts.pop() if parts else await receive()

        await self._app(scope, receive_again, send)


def _names_url(value: Any) -> bool:
    """True if a text in a JSON value is a URL; `url` of an uploaded file is the page's own, and unused."""
    if isinstance(value, dict):
        return any(_names_url(each) for name, each in value.items() if name != "url")
    if isinstance(value, list):
        return any(map(_names_url, value))
    return isinstance(value, str) and URL.match(value) is not None
