"""Messages between the server and a worker: plain values as JSON, then blobs of bytes."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

LENGTHS = struct.Struct("<II")  # of the JSON part, and of all blobs together

Frame = tuple[dict[str, Any], list[bytes]]


def pack(values: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """Encode a frame."""
    head = json.dumps([values, [len(blob) for blob in blobs]]).encode()
    return b"".join((LENGTHS.pack(len(head), sum(map(len, blobs))), head, *blobs))


def _unpack(head: bytes, body: bytes) -> Frame:
    values, sizes = json.loads(head)
    blobs, start = [], 0
    for size in sizes:
        blobs.append(body[start : start + size])
        start += size
    return values, blobs


def read(stream: BinaryIO) -> Frame | None:
    """Read a frame; None at the end of the stream."""
    lengths = stream.read(LENGTHS.size)
    if len(lengths) < LENGTHS.size:
        return None
    head, blobs = LENGTHS.unpack(lengths)
    return _unpack(stream.read(head), stream.read(blobs))


async def read_async(stream: asyncio.StreamReader) -> Frame:
    """Read a frame. Raises: asyncio.IncompleteReadError at the end of the stream."""
    head, blobs = LENGTHS.unpack(await stream.readexactly(LENGTHS.size))
    return _unpack(await stream.readexactly(head), await stream.readexactly(blobs))
