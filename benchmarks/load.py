"""A load generator with little overhead of its own: raw HTTP over persistent connections."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

LOST = 0  # the status of a request without an answer


@dataclass(frozen=True)
class Reply:
    """An answer. start: when the request was due, in seconds since the beginning of the load; seconds: from
    then to the complete answer; status: of HTTP, or LOST."""

    start: float
    seconds: float
    status: int
    body: bytes
    headers: bytes = b""

    @property
    def results(self) -> list[dict]:
        """Return the results of /predict."""
        return json.loads(self.body)["results"]


def post(
    body: bytes,
    path: str = "/predict",
    content_type: str = "application/octet-stream",
    more: str = "",
) -> bytes:
    """Return the bytes of a POST request. more: other header lines, each with its line break."""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: {content_type}\r\n{more}"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def form(image: bytes, name: str = "image.jpg", field: str = "file") -> tuple[bytes, str]:
    """Return the body and the content type of a form with one file."""
    boundary = "hf-cifar-boundary"
    head = (
        f'--{boundary}\r\ncontent-disposition: form-data; name="{field}"; filename="{name}"\r\n'
        "content-type: image/jpeg\r\n\r\n"
    )
    body = head.encode() + image + f"\r\n--{boundary}--\r\n".encode()
    return body, f"multipart/form-data; boundary={boundary}"


class Client:
    """Kept connections to a server; a request takes a free one, or opens another."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.host, self.port = host, port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, request: bytes, due: float = 0.0, start: float | None = None) -> Reply:
        """Send a request, and wait for the answer."""
        start = time.perf_counter() - due if start is None else start
        try:
            connection = (
                self._free.pop()
                if self._free
                else await asyncio.open_connection(self.host, self.port)
            )
        except OSError:
            return Reply(due, time.perf_counter() - start - due, LOST, b"")
        reader, writer = connection
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            lower = head.lower()
            at = lower.index(b"content-length:")
            size = int(lower[at + 15 : lower.index(b"\r\n", at)])
            body = await reader.readexactly(size)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            writer.close()
            return Reply(due, time.perf_counter() - start - due, LOST, b"")
        if b"connection: close" in lower:
            writer.close()
        else:
            self._free.append(connection)
        seconds = time.perf_counter() - start - due
        return Reply(due, seconds, int(head.split(b" ", 2)[1]), body, head)

    def close(self) -> None:
        """Close all connections."""
        for _, writer in self._free:
            writer.close()
        self._free.clear()


async def closed_loop(
    port: int, requests: Sequence[bytes], clients: int, seconds: float | None = None
) -> list[Reply]:
    """Send requests from clients that each wait for their answer: every request once, in order, or, given
    seconds, in rotation until the time is up."""
    client, replies = Client(port), [Reply(0, 0, LOST, b"")] * len(requests)
    numbers = itertools.count()
    start = time.perf_counter()
    timed: list[Reply] = []

    async def work() -> None:
        for number in numbers:
            now = time.perf_counter() - start
            if number >= len(requests) if seconds is None else now > seconds:
                return
            reply = await client.send(requests[number % len(requests)], now, start)
            if seconds is None:
                replies[number] = reply
            else:
                timed.append(reply)

    await asyncio.gather(*(work() for _ in range(clients)))
    client.close()
    return replies if seconds is None else timed


async def open_loop(
    port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0
) -> list[Reply]:
    """Send requests at random times, `rate` of them per second on average, whether or not earlier ones are
    answered. The time of an answer counts from the time at which its request was due."""
    generator, due, times = random.Random(seed), 0.0, []
    while (due := due + generator.expovariate(rate)) < seconds:
        times.append(due)
    client, tasks = Client(port), []
    start = time.perf_counter()
    for number, due in enumerate(times):
        wait = start + due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(client.send(requests[number % len(requests)], due, start)))
    replies = await asyncio.gather(*tasks)
    client.close()
    return replies


def run(load: Callable[[], Coroutine[Any, Any, list[Reply]]]) -> list[Reply]:
    """Run a load in a thread with an event loop of its own, the fast one if it is installed."""
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop

    def in_thread() -> list[Reply]:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(load())

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(in_thread).result()


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
