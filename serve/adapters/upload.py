"""An upload: a multipart form is parsed as it arrives, and becomes at most two files in one folder, and their notes.

    form > part > adapter_config.json | adapter_model.safetensors | one archive of them | one GGUF file |
                  something to pass over

The first bytes of a README.md and a manifest.json lie beside them for the judge; the store does not keep those. A GGUF
file becomes the two when it is known for which base it is (serve.rollout.lifecycle).

Nothing here trusts a name or a format that the client states: names choose between two constants, formats are
recognised by their first bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from serve.adapters.adapter import FILES, NOTES
from serve.adapters.archive import HEAD_BYTES, archive_kind, unpack
from serve.adapters.byte_ledger import Kind, Room
from serve.adapters.file_thread import in_turn
from serve.adapters.multipart_form import FormRules, read_form
from serve.adapters.shards import is_shard, join
from serve.adapters.untrusted import BOTH_FILES, NO_PICKLES, create, is_left_over, is_pickle, sniff, write
from serve.errors import AdapterRejected, BadRequest, TooLarge
from serve.names import shown

_ARCHIVE = "upload.archive"
GGUF_FILE = "upload.gguf"
_ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst")
_RULES = FormRules("an adapter", BOTH_FILES, parts=64, field_bytes=64 << 10, step=64 << 10)


async def receive(
    stream: AsyncIterator[bytes], content_type: str, folder: Path, room: Room, *, max_bytes: int
) -> dict[str, str]:
    """Leave the adapter's two files in `folder`, and its notes, and answer the form's text fields.

    At most `max_bytes` are taken from the wire, and as many are unpacked: more is TooLarge as soon as it shows. Each
    byte is taken from the `room` before it is written.
    """
    too_large = TooLarge(f"this upload is above the {max_bytes} bytes that this server takes")
    with ExitStack() as stack:
        files = _Files(folder, room, stack)
        fields = await read_form(stream, content_type, _RULES, files, max_bytes=max_bytes, too_large=too_large)
    await in_turn(_finish, folder, files, room.beside(Kind.UNPACKED), max_bytes)
    return fields


def _finish(folder: Path, files: _Files, room: Room, max_bytes: int) -> None:
    if files.archive:
        unpack(folder / _ARCHIVE, room.take, max_bytes=max_bytes)
    for name, text in files.notes.items():
        if not (folder / name).exists():
            with create(folder / name) as sink:
                write(sink, bytes(text))
    join(folder, room.take)
    _both_there(folder, files)


def _both_there(folder: Path, files: _Files) -> None:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if not missing or files.gguf:
        return
    if files.count == 0:
        raise BadRequest(f"the form has no file; {BOTH_FILES}", param="files")
    raise AdapterRejected(f"the upload has no {' and no '.join(missing)}; {BOTH_FILES}")


# The form's files


@dataclass(slots=True)
class _File:
    """One file while it arrives; without a sink and a head it is passed over."""

    name: str
    sink: IO[bytes] | None = None
    head: bytearray | None = None  # the first bytes, until they say what it is
    note: bytearray | None = None


class _Files:
    """Keeps those that make an adapter, in `folder`."""

    def __init__(self, folder: Path, room: Room, stack: ExitStack) -> None:
        self.count = 0
        self.archive = False
        self.gguf = False
        self.notes: dict[str, bytearray] = {}
        self._folder = folder
        self._room = room
        self._stack = stack
        self._kept: set[str] = set()
        self._file = _File("")

    def begin(self, field: str, filename: str) -> None:
        self.count += 1
        self._file = file = _File(filename)
        if filename in FILES or is_shard(filename):
            file.sink = self._keep(filename)
        elif filename in NOTES:
            file.note = self.notes.setdefault(filename, bytearray())
        elif is_pickle(filename):
            raise AdapterRejected(f"{shown(filename)} {NO_PICKLES}")
        elif not is_left_over(filename):
            file.head = bytearray()

    def data(self, data: bytes) -> None:
        file = self._file
        if file.sink is not None:
            self._room.take(len(data))
            write(file.sink, data)
        elif file.note is not None:
            file.note += data[: NOTES[file.name] - len(file.note)]
        elif file.head is not None:
            file.head += data
            if len(file.head) >= HEAD_BYTES:
                self._recognise(bytes(file.head))

    def end(self) -> None:
        if self._file.head is not None:
            self._recognise(bytes(self._file.head))

    def _recognise(self, head: bytes) -> None:
        """Whether a file of no known name is an archive."""
        file = self._file
        file.head = None
        if archive_kind(head):
            if self.archive:
                raise BadRequest(f"the form has two archives; {BOTH_FILES}", param="files")
            self.archive = True
            file.sink = self._keep(_ARCHIVE)
            self._room.take(len(head))
            write(file.sink, head)
        elif head.startswith(b"GGUF"):
            self.gguf = True
            file.sink = self._keep(GGUF_FILE)
            self._room.take(len(head))
            write(file.sink, head)
        elif file.name.lower().endswith(_ARCHIVE_ENDINGS):
            raise AdapterRejected(f"{shown(file.name)} is neither a zip nor a tar archive; {BOTH_FILES}")
        elif sniff(head) == "a Python pickle":
            raise AdapterRejected(f"{shown(file.name)} {NO_PICKLES}")

    def _keep(self, name: str) -> IO[bytes]:
        if name in self._kept:
            raise BadRequest(f"the form has {name} twice; {BOTH_FILES}", param="files")
        self._kept.add(name)
        for alone, what in ((_ARCHIVE, "an archive"), (GGUF_FILE, "a GGUF file")):
            if alone in self._kept and len(self._kept) > 1:
                raise BadRequest(f"the form has {what} and loose files; {BOTH_FILES}", param="files")
        return self._stack.enter_context(create(self._folder / name))
