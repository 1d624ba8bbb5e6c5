"""HTTP/1.1 with limits that uvicorn leaves to a proxy: on the time and the size of a request's headers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 16 * 1024
REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


def limited_protocol(header_seconds: float) -> type[HttpToolsProtocol]:
    """Return a protocol whose connections end if a request's headers take longer than this, or have more than
    `MAX_HEADER_BYTES`."""

    class LimitedProtocol(HttpToolsProtocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._timer: asyncio.TimerHandle | None = None
            self._header_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            # The parser reports a header once it is complete, however long it is.
            self._header_bytes += len(data)
            super().data_received(data)
            if self._timer is not None and self._header_bytes > MAX_HEADER_BYTES:
                self._refuse_headers()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._header_bytes = 0
            self._start_timer()

        def on_url(self, url: bytes) -> None:
            super().on_url(url)
            self._count(len(url))

        def on_header(self, name: bytes, value: bytes) -> None:
            super().on_header(name, value)
            self._count(len(name) + len(value))

        def on_headers_complete(self) -> None:
            self._stop_timer()
            if not self.transport.is_closing():
                super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "the request is not valid HTTP")

        def _count(self, size: int) -> None:
            self._header_bytes += size
            if self._header_bytes > MAX_HEADER_BYTES:
                self._refuse_headers()

        def _refuse_headers(self) -> None:
            self._refuse(431, f"the headers have more than {MAX_HEADER_BYTES:,} bytes")

        def _start_timer(self) -> None:
            self._stop_timer()
            self._timer = self.loop.call_later(header_seconds, self._refuse_late)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse_late(self) -> None:
            self._refuse(408, f"the headers took more than {header_seconds:g} s")

        def _refuse(self, status: int, message: str) -> None:
            """Answer outside the application, and close the connection."""
            if self.transport.is_closing():
                return
            body = json.dumps({"error": message}).encode()
            head = (
                f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

    return LimitedProtocol
