"""What happens to every request, whatever its route: its key, id, log line, metrics and headers."""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_cifar.serve.app import Refusal, Service

requests_log = logging.getLogger("hf_cifar.requests")
OPEN_PATHS = ("/", "/livez", "/readyz", "/docs", "/openapi.json")  # without a key
OTHER_PATH = "other"  # of metrics: clients can request any path, and each would be a time series
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Gate:
    """Wraps an application; no content of a request is logged, and no key."""

    def __init__(self, app: ASGIApp, service: Service, paths: set[str]) -> None:
        self._app, self._service, self._paths = app, service, paths
        key = service.config.api_key
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, status = time.perf_counter(), 0
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        number = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()

        async def send_more(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = [*message.get("headers", ()), (b"x-request-id", number), *HEADERS]
                if self._service.draining:
                    added.append((b"connection", b"close"))
                message = {**message, "headers": added}
            await send(message)

        path = scope["path"] if scope["path"] in self._paths else OTHER_PATH
        try:
            if self._may_call(scope["path"], headers):
                await self._app(scope, receive, send_more)
            else:
                problem = {"error": "the key is missing or wrong; send Authorization: Bearer KEY"}
                challenge = {"www-authenticate": "Bearer"}
                await Refusal(problem, 401, challenge)(scope, receive, send_more)
        finally:
            seconds = time.perf_counter() - start
            self._service.metrics.count_request(path, status, seconds)
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "id": number.decode(), "method": scope["method"], "path": path, "status": status,
                "milliseconds": round(1000 * seconds, 1), "images": scope.get("hf_cifar.images", 0),
                "model": self._service.workers.about.get("model"),
            }  # fmt: skip
            requests_log.info(json.dumps(line))

    def _may_call(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or path in OPEN_PATHS:
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)
