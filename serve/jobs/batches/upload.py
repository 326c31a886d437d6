"""A file that a client sends as a form: its bytes go to the disk as they arrive, and its name names no place."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import IO

from serve.adapters.byte_ledger import Room
from serve.adapters.multipart_form import FormRules, read_form
from serve.adapters.untrusted import write
from serve.errors import BadRequest, TooLarge
from serve.names import shown

FORM = "send multipart/form-data with a field `purpose` and the file as `file`"
# Beside the file, the form may have so many bytes.
FRAMING = 64 << 10
# Each line costs whoever reads the file: 200 MiB of `{}` a minute of a processor, of empty ones a third of that.
LINES = 1 << 20
MAX_NAME = 255
_RULES = FormRules("a file", FORM, parts=16, field_bytes=1024, step=256 << 10, encoded=True)


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
    room: Room,
    *,
    max_bytes: int,
    max_lines: int = LINES,
) -> Received:
    """Write the form's file to `sink`, each byte taken from the `room` before; TooLarge above `max_bytes` or lines."""
    file = _File(sink, room, max_bytes, max_lines)
    fields = await read_form(
        stream,
        content_type,
        _RULES,
        file,
        max_bytes=max_bytes + FRAMING,
        too_large=too_large(max_bytes),
    )
    if file.name is None:
        raise BadRequest(f"the form has no file; {FORM}", param="file")
    return Received(fields, file.name, file.nbytes)


def too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the file is above the {max_bytes} bytes that this server takes: send it in parts", param="file")


class _File:
    """The form's one file."""

    def __init__(self, sink: IO[bytes], room: Room, max_bytes: int, max_lines: int) -> None:
        self.name: str | None = None
        self.nbytes = self.lines = 0
        self._sink = sink
        self._room = room
        self._max_bytes = max_bytes
        self._max_lines = max_lines

    def begin(self, field: str, filename: str) -> None:
        if field != "file" or self.name is not None:
            raise BadRequest(f"the form has the file `{shown(field)}`; {FORM}, once", param="file")
        self.name = shown(filename, MAX_NAME) or "file.jsonl"

    def data(self, data: bytes) -> None:
        self.nbytes += len(data)
        if self.nbytes > self._max_bytes:
            raise too_large(self._max_bytes)
        self.lines += data.count(b"\n")
        if self.lines > self._max_lines:
            raise TooLarge(f"the file has more than {self._max_lines} lines: send it in parts", param="file")
        self._room.take(len(data))
        write(self._sink, data)

    def end(self) -> None:
        """The form may have more fields."""
