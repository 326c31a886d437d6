"""A file that a client sends as multipart/form-data: its bytes go to the disk as they arrive, piece by piece.

Nothing that the client states is trusted: bytes are counted, and the file's name is kept as a text and names no place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.adapters.untrusted import write
from serve.errors import BadRequest, TooLarge
from serve.names import shown

FORM = "send multipart/form-data with a field `purpose` and the file as `file`"
MAX_PARTS, MAX_FIELD_BYTES, MAX_NAME = 16, 1024, 255
# Beside the file, the form may have so many bytes.
FRAMING = 64 << 10
# Bytes that are parsed and written at a time, on another thread than the event loop's.
_STEP = 256 << 10


@dataclass(frozen=True, slots=True)
class Received:
    """The form's text fields, and the file's name and size."""

    fields: dict[str, str]
    filename: str
    nbytes: int


async def receive(
    stream: AsyncIterator[bytes],
    content_type: str,
    sink: IO[bytes],
    *,
    max_bytes: int,
    check_space: Callable[[int], None] = lambda nbytes: None,
) -> Received:
    """Write the form's file to `sink`; TooLarge as soon as more than `max_bytes` came."""
    form = _Form(sink, max_bytes)
    parser = MultipartParser(_boundary(content_type), form.callbacks())  # type: ignore[arg-type]
    received, waiting = 0, bytearray()

    def step(data: bytes) -> None:
        check_space(len(data))
        try:
            parser.write(data)
        except FormParserError as malformed:
            raise BadRequest(f"the body is not well-formed multipart/form-data: {shown(malformed)}") from malformed

    async for chunk in stream:
        received += len(chunk)
        if received > max_bytes + FRAMING:
            raise too_large(max_bytes)
        waiting += chunk
        if len(waiting) >= _STEP:
            await asyncio.to_thread(step, bytes(waiting))
            waiting.clear()
    await asyncio.to_thread(step, bytes(waiting))
    if not form.ended:
        raise BadRequest("the body ended before its closing boundary; send it again" if received else FORM)
    if form.filename is None:
        raise BadRequest(f"the form has no file; {FORM}", param="file")
    return Received(form.fields, form.filename, form.nbytes)


def too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the file is above the {max_bytes} bytes that this server takes: send it in parts", param="file")


def _boundary(content_type: str) -> bytes:
    try:
        kind, options = parse_options_header(content_type)
    except (ValueError, AssertionError) as odd:
        raise BadRequest("the Content-Type header cannot be read; send multipart/form-data") from odd
    if kind != b"multipart/form-data":
        raise BadRequest(f"a file arrives as multipart/form-data and not as `{shown(content_type)}`; {FORM}")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise BadRequest("the Content-Type header has no usable boundary (1 to 70 characters); let your client set it")
    return boundary


@dataclass(slots=True)
class _Part:
    """One part while it arrives."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    text: bytearray | None = None


class _Form:
    """What the parser calls, on a thread of its own."""

    def __init__(self, sink: IO[bytes], max_bytes: int) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.nbytes = 0
        self.ended = False
        self._sink, self._max_bytes = sink, max_bytes
        self._parts = 0
        self._part = _Part()
        self._header_name, self._header_value = bytearray(), bytearray()

    def callbacks(self) -> dict[str, Callable[..., None]]:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequest(f"the form has more than {MAX_PARTS} parts; {FORM}")
        self._part = _Part()

    def _header_end(self) -> None:
        self._part.headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        part = self._part
        disposition, options = parse_options_header(part.headers.get(b"content-disposition", b"").decode("latin-1"))
        if disposition != b"form-data" or b"name" not in options:
            raise BadRequest("a part of the form has no name; each needs `Content-Disposition: form-data; name=...`")
        part.name = _text(options[b"name"], "the name of a field")
        if b"filename" not in options:
            if part.name in self.fields:
                raise BadRequest(f"the form names `{shown(part.name)}` twice", param=shown(part.name))
            part.text = bytearray()
        elif part.name != "file" or self.filename is not None:
            raise BadRequest(f"the form has the file `{shown(part.name)}`; {FORM}, once", param="file")
        else:
            name = options[b"filename"].decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
            self.filename = shown(name, MAX_NAME) or "file.jsonl"

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.text is None:
            self.nbytes += end - start
            if self.nbytes > self._max_bytes:
                raise too_large(self._max_bytes)
            write(self._sink, data[start:end])
            return
        part.text += data[start:end]
        if len(part.text) > MAX_FIELD_BYTES:
            raise TooLarge(f"the field `{shown(part.name)}` is above {MAX_FIELD_BYTES} bytes; {FORM}")

    def _part_end(self) -> None:
        part = self._part
        if part.text is not None:
            self.fields[part.name] = _text(bytes(part.text), f"the field `{shown(part.name)}`")

    def _end(self) -> None:
        self.ended = True


def _text(data: bytes, what: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as odd:
        raise BadRequest(f"{what} is not UTF-8; send text as UTF-8") from odd
    if "\0" in text:
        raise BadRequest(f"{what} has a zero byte; send text")
    return text
