"""The images of a request: raw bytes, or the files of a form."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

FIELD = "file"
# It logs what clients send.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
RAW_TYPES = ("image/", "application/octet-stream")
FORM_TYPE = "multipart/form-data"


class Refused(Exception):
    """A request that is answered with an error. status: of HTTP. close: the rest of its body is not read."""

    def __init__(self, status: int, message: str, *, close: bool = False) -> None:
        super().__init__(message)
        self.status, self.close = status, close


async def read_body(stream: AsyncIterator[bytes], declared: str, max_bytes: int) -> bytes:
    """Read a request's body. declared: its Content-Length.

    Raises: Refused as soon as it is known to be too large.
    """
    too_large = Refused(
        413, f"the request is larger than {max_bytes:,} bytes, the limit of this server", close=True
    )
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    chunks, size = [], 0
    async for chunk in stream:
        size += len(chunk)
        if size > max_bytes:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


def images_of(body: bytes, content_type: str, max_images: int) -> list[bytes]:
    """Return the encoded images of a request.

    Raises: Refused for another type of content, a damaged form, and no image, an empty one, or too many.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == FORM_TYPE:
        images = _files_of_form(body, content_type, max_images)
    elif kind.startswith(RAW_TYPES):
        images = [body]
    else:
        raise Refused(
            415,
            f"the content type is {kind[:80] or 'missing'}; send {FORM_TYPE} with fields named {FIELD!r}, "
            "or the bytes of one image as application/octet-stream",
        )  # fmt: skip
    if images in ([], [b""]):
        raise Refused(400, f"the request has no image; send fields named {FIELD!r}, or raw bytes")
    return images


def _files_of_form(body: bytes, content_type: str, max_images: int) -> list[bytes]:
    """Return the contents of the fields named `file`; the names of the files are not read.

    Raises: Refused for a damaged form, a field of another name, or too many fields.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise Refused(400, "the form has no boundary in its Content-Type")
    form = _Form(max_images)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise Refused(
            400, "the form is damaged: its content does not match the boundary in its Content-Type"
        ) from None
    if not form.complete:
        raise Refused(400, "the form is damaged: its end is missing")
    return form.files


class _Form:
    """Collects the parts of a form while it is parsed."""

    def __init__(self, max_images: int) -> None:
        self.files: list[bytes] = []
        self.complete = False
        self._max_images = max_images
        self._header, self._value, self._field = b"", b"", b""
        self._content: list[bytes] = []

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_to_header,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._check_field,
            "on_part_data": lambda data, start, end: self._content.append(data[start:end]),
            "on_part_end": lambda: self.files.append(b"".join(self._content)),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.files) == self._max_images:
            raise Refused(
                413,
                f"the request has more than {self._max_images} images, the limit of this server",
            )
        self._content, self._field = [], b""

    def _add_to_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            kind, options = parse_options_header(self._value)
            self._field = options.get(b"name", b"") if kind == b"form-data" else b""
        self._header, self._value = b"", b""

    def _check_field(self) -> None:
        if self._field != FIELD.encode():
            raise Refused(400, f"the form has a field that is not named {FIELD!r}; rename it")

    def _end(self) -> None:
        self.complete = True
