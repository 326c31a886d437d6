"""An upload: a multipart form is parsed as it arrives, and becomes at most two files in one folder, and their card.

    form > part > adapter_config.json | adapter_model.safetensors | one archive of them | something to pass over

Where licenses are checked, the first bytes of a README.md lie beside them for the judge; the store does not keep it.

Nothing here trusts a name, a size or a format that the client states: names choose between two constants, bytes are
counted, formats are recognised by their first bytes. Every malformed body ends as one of our errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.adapters.adapter import CARD, CARD_BYTES, FILES
from serve.adapters.archive import HEAD_BYTES, archive_kind, unpack
from serve.adapters.shards import is_shard, join
from serve.adapters.untrusted import BOTH_FILES, NO_PICKLES, create, is_left_over, is_pickle, sniff, write
from serve.errors import AdapterRejected, BadRequest, TooLarge
from serve.names import shown

MAX_PARTS = 64
MAX_FIELD_BYTES = 64 << 10

_ARCHIVE = "upload.archive"
_ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
# Bytes that are parsed and written at a time, on another thread than the event loop's.
_STEP = 64 << 10


async def receive(
    stream: AsyncIterator[bytes], content_type: str, folder: Path, *, max_bytes: int, card: bool = False
) -> dict[str, str]:
    """Leave the adapter's two files in `folder`, and its card if asked, and answer the form's text fields.

    At most `max_bytes` are taken from the wire, and as many are unpacked: more is TooLarge as soon as it shows.
    """
    received = 0
    with ExitStack() as files:
        form = _Form(folder, files)
        parser = MultipartParser(_boundary(content_type), form.callbacks())  # type: ignore[arg-type]
        waiting = bytearray()
        async for chunk in stream:
            received += len(chunk)
            if received > max_bytes:
                raise TooLarge(f"this upload is above the {max_bytes} bytes that this server takes")
            waiting += chunk
            if len(waiting) >= _STEP:
                await asyncio.to_thread(_parse, parser, bytes(waiting))
                waiting.clear()
        await asyncio.to_thread(_parse, parser, bytes(waiting))
        if not form.ended:
            raise BadRequest(
                "the body is empty; " + BOTH_FILES
                if not received
                else "the body ended before its closing boundary; send it again"
            )
    await asyncio.to_thread(_finish, folder, form, max_bytes, card)
    return form.fields


def _parse(parser: MultipartParser, data: bytes) -> None:
    try:
        parser.write(data)
    except FormParserError as malformed:
        raise BadRequest(f"the body is not well-formed multipart/form-data: {shown(malformed)}") from malformed


def _finish(folder: Path, form: _Form, max_bytes: int, card: bool) -> None:
    if form.archive:
        unpack(folder / _ARCHIVE, max_bytes=max_bytes, card=card)
    if card and form.card and not (folder / CARD).exists():
        with create(folder / CARD) as sink:
            write(sink, bytes(form.card))
    join(folder)
    _both_there(folder, form)


def _boundary(content_type: str) -> bytes:
    try:
        kind, options = parse_options_header(content_type)
    except (ValueError, AssertionError) as odd:
        raise BadRequest("the Content-Type header cannot be read; send multipart/form-data") from odd
    if kind != b"multipart/form-data":
        raise BadRequest(f"an adapter arrives as multipart/form-data and not as `{shown(content_type)}`; {BOTH_FILES}")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise BadRequest("the Content-Type header has no usable boundary (1 to 70 characters); let your client set it")
    return boundary


def _both_there(folder: Path, form: _Form) -> None:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if not missing:
        return
    if form.files == 0:
        raise BadRequest(f"the form has no file; {BOTH_FILES}", param="files")
    raise AdapterRejected(f"the upload has no {' and no '.join(missing)}; {BOTH_FILES}")


# The form


@dataclass(slots=True)
class _Part:
    """One part while it arrives."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    filename: str | None = None
    text: bytearray | None = None
    head: bytearray | None = None  # the first bytes of a file, until they say what it is
    card: bool = False
    sink: IO[bytes] | None = None


class _Form:
    """What the parser's callbacks tell becomes fields and files."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.fields: dict[str, str] = {}
        self.files = 0
        self.archive = False
        self.card = bytearray()
        self.ended = False
        self._kept: set[str] = set()
        self._parts = 0
        self._part = _Part()
        self._header_name = bytearray()
        self._header_value = bytearray()

    def callbacks(self) -> dict[str, Any]:
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
            raise BadRequest(f"the form has more than {MAX_PARTS} parts; {BOTH_FILES}")
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
        if part.headers.get(b"content-transfer-encoding", b"binary").strip().lower() not in (
            b"binary",
            b"8bit",
            b"7bit",
        ):
            raise BadRequest("a part of the form has a Content-Transfer-Encoding; send its bytes as they are")
        part.name = _text(options[b"name"], "the name of a field")
        if b"filename" not in options:
            if part.name in self.fields:
                raise BadRequest(f"the form names `{shown(part.name)}` twice", param=shown(part.name))
            part.text = bytearray()
            return
        self.files += 1
        part.filename = _basename(options[b"filename"].decode("utf-8", "replace"))
        if part.filename in FILES or is_shard(part.filename):
            part.sink = self._keep(part.filename)
        elif part.filename == CARD:
            part.card = True
        elif is_pickle(part.filename):
            raise AdapterRejected(f"{shown(part.filename)} {NO_PICKLES}")
        elif not is_left_over(part.filename):
            part.head = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.text is not None:
            part.text += data[start:end]
            if len(part.text) > MAX_FIELD_BYTES:
                raise TooLarge(f"the field `{shown(part.name)}` is above {MAX_FIELD_BYTES} bytes; send files as files")
        elif part.sink is not None:
            write(part.sink, data[start:end])
        elif part.card:
            self.card += data[start:end][: CARD_BYTES - len(self.card)]
        elif part.head is not None:
            part.head += data[start:end]
            if len(part.head) >= HEAD_BYTES:
                self._recognise()

    def _part_end(self) -> None:
        part = self._part
        if part.text is not None:
            self.fields[part.name] = _text(bytes(part.text), f"the field `{shown(part.name)}`")
        elif part.head is not None:
            self._recognise()

    def _end(self) -> None:
        self.ended = True

    def _recognise(self) -> None:
        """Whether a file of no known name is an archive."""
        part, head = self._part, bytes(self._part.head or b"")
        part.head = None
        if archive_kind(head):
            if self.archive:
                raise BadRequest(f"the form has two archives; {BOTH_FILES}", param="files")
            self.archive = True
            part.sink = self._keep(_ARCHIVE)
            write(part.sink, head)
        elif (part.filename or "").lower().endswith(_ARCHIVE_ENDINGS):
            raise AdapterRejected(f"{shown(part.filename)} is neither a zip nor a tar archive; {BOTH_FILES}")
        elif sniff(head) == "a Python pickle":
            raise AdapterRejected(f"{shown(part.filename)} {NO_PICKLES}")

    def _keep(self, name: str) -> IO[bytes]:
        if name in self._kept:
            raise BadRequest(f"the form has {name} twice; {BOTH_FILES}", param="files")
        self._kept.add(name)
        if _ARCHIVE in self._kept and len(self._kept) > 1:
            raise BadRequest(f"the form has an archive and loose files; {BOTH_FILES}", param="files")
        return self.stack.enter_context(create(self.folder / name))


def _basename(filename: str) -> str:
    return filename.replace("\\", "/").rpartition("/")[2]


def _text(data: bytes, what: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as odd:
        raise BadRequest(f"{what} is not UTF-8; send text as UTF-8") from odd
    if "\0" in text:
        raise BadRequest(f"{what} has a zero byte; send text")
    return text
