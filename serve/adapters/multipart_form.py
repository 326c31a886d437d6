"""A form, as multipart/form-data: parsed as it arrives, its texts kept and its files handed on piece by piece.

Nothing that the client states is trusted: bytes are counted, of a file's name only the last part counts, and every
malformed body ends as one of our errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.errors import BadRequest, TooLarge
from serve.names import shown

_UNENCODED = (b"binary", b"8bit", b"7bit")


@dataclass(frozen=True, slots=True)
class FormRules:
    """What a form may hold. `what` arrives in it, `advice` says how: errors end with it.

    `step`: bytes that are parsed and written at a time, on another thread than the event loop's. `encoded`: parts may
    have a Content-Transfer-Encoding, which is not undone.
    """

    what: str
    advice: str
    parts: int
    field_bytes: int
    step: int
    encoded: bool = False


class Files(Protocol):
    """Takes the form's files, one after another, on another thread than the event loop's."""

    def begin(self, field: str, filename: str) -> None: ...
    def data(self, data: bytes) -> None: ...
    def end(self) -> None: ...


async def pieces(stream: AsyncIterator[bytes], step: int, max_bytes: int, too_large: TooLarge) -> AsyncIterator[bytes]:
    """A body, at least `step` bytes at a time until its end; `too_large` as soon as more than `max_bytes` came."""
    received, waiting = 0, bytearray()
    async for chunk in stream:
        received += len(chunk)
        if received > max_bytes:
            raise too_large
        waiting += chunk
        if len(waiting) >= step:
            yield bytes(waiting)
            waiting.clear()
    if waiting:
        yield bytes(waiting)


async def read_form(
    stream: AsyncIterator[bytes],
    content_type: str,
    rules: FormRules,
    files: Files,
    *,
    max_bytes: int,
    too_large: TooLarge,
) -> dict[str, str]:
    """The form's text fields; its files are in `files` then. `max_bytes` are of the whole body."""
    form = _Form(rules, files)
    parser = MultipartParser(_boundary(content_type, rules), form.callbacks())  # type: ignore[arg-type]

    def parse(piece: bytes) -> None:
        try:
            parser.write(piece)
        except FormParserError as malformed:
            raise BadRequest(f"the body is not well-formed multipart/form-data: {shown(malformed)}") from malformed

    is_empty = True
    async for piece in pieces(stream, rules.step, max_bytes, too_large):
        is_empty = False
        await asyncio.to_thread(parse, piece)
    if is_empty:
        raise BadRequest(f"the body is empty; {rules.advice}")
    if not form.ended:
        raise BadRequest("the body ended before its closing boundary; send it again")
    return form.fields


def _boundary(content_type: str, rules: FormRules) -> bytes:
    try:
        kind, options = parse_options_header(content_type)
    except (ValueError, AssertionError) as odd:
        raise BadRequest("the Content-Type header cannot be read; send multipart/form-data") from odd
    if kind != b"multipart/form-data":
        raise BadRequest(
            f"{rules.what} arrives as multipart/form-data and not as `{shown(content_type)}`; {rules.advice}"
        )
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise BadRequest("the Content-Type header has no usable boundary (1 to 70 characters); let your client set it")
    return boundary


@dataclass(slots=True)
class _Part:
    """One part while it arrives; a file has no text."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    text: bytearray | None = None


class _Form:
    """What the parser's callbacks tell becomes fields and files."""

    def __init__(self, rules: FormRules, files: Files) -> None:
        self.fields: dict[str, str] = {}
        self.ended = False
        self._rules, self._files = rules, files
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
        if self._parts > self._rules.parts:
            raise BadRequest(f"the form has more than {self._rules.parts} parts; {self._rules.advice}")
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
        encoding = part.headers.get(b"content-transfer-encoding", b"binary").strip().lower()
        if encoding not in _UNENCODED and not self._rules.encoded:
            raise BadRequest("a part of the form has a Content-Transfer-Encoding; send its bytes as they are")
        part.name = _text(options[b"name"], "the name of a field")
        if b"filename" in options:
            filename = options[b"filename"].decode("utf-8", "replace")
            self._files.begin(part.name, filename.replace("\\", "/").rpartition("/")[2])
            return
        if part.name in self.fields:
            raise BadRequest(f"the form names `{shown(part.name)}` twice", param=shown(part.name))
        part.text = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.text is None:
            self._files.data(data[start:end])
            return
        part.text += data[start:end]
        if (limit := self._rules.field_bytes) < len(part.text):
            raise TooLarge(f"the field `{shown(part.name)}` is above {limit} bytes; send files as files")

    def _part_end(self) -> None:
        part = self._part
        if part.text is None:
            self._files.end()
        else:
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
