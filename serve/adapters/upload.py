"""An upload: a multipart form is parsed as it arrives, and becomes at most two files in one folder, and their card.

    form > part > adapter_config.json | adapter_model.safetensors | one archive of them | something to pass over

Where licenses are checked, the first bytes of a README.md lie beside them for the judge; the store does not keep it.

Nothing here trusts a name, a size or a format that the client states: names choose between two constants, bytes are
counted, formats are recognised by their first bytes. Every malformed body ends as one of our errors.
"""

from __future__ import annotations

import asyncio
import errno
import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from serve.adapters.adapter import CARD, CARD_BYTES, CONFIG, FILES, WEIGHTS, sniff
from serve.errors import AdapterRejected, BadRequest, OutOfSpace, TooLarge
from serve.names import shown

MAX_PARTS = 64
MAX_FIELD_BYTES = 64 << 10
MAX_ENTRIES = 1000

_ARCHIVE = "upload.archive"
_ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What a trainer leaves in the same folder; it is passed over, unread.
_BESIDE = {"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"}
_BESIDE_STARTS = ("rng_state", "random_states", "._")
_HEAD = 512
_FLUSH = 1 << 20
_CHUNK = 256 << 10
_TAR_HEADER_BYTES = 64 << 10

_BOTH = f"send {CONFIG} and {WEIGHTS}, or one .zip or .tar.gz of them"
_NO_PICKLES = (
    "is a pickle, which this server never opens: it takes safetensors only; load the adapter with PEFT and save it "
    "with save_pretrained(..., safe_serialization=True)"
)


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
        async for chunk in stream:
            received += len(chunk)
            if received > max_bytes:
                raise TooLarge(f"this upload is above the {max_bytes} bytes that this server takes")
            try:
                parser.write(chunk)
            except FormParserError as malformed:
                raise BadRequest(f"the body is not well-formed multipart/form-data: {shown(malformed)}") from malformed
            if form.pending_bytes >= _FLUSH:
                await asyncio.to_thread(form.flush)
        if not form.ended:
            raise BadRequest(
                "the body is empty; " + _BOTH
                if not received
                else "the body ended before its closing boundary; send it again"
            )
        await asyncio.to_thread(form.flush)
    if form.archive:
        await asyncio.to_thread(_unpack, folder, max_bytes, card)
    if card and form.card and not (folder / CARD).exists():
        with _create(folder / CARD) as sink:
            _write(sink, bytes(form.card))
    _both_there(folder, form)
    return form.fields


def _boundary(content_type: str) -> bytes:
    try:
        kind, options = parse_options_header(content_type)
    except (ValueError, AssertionError) as odd:
        raise BadRequest("the Content-Type header cannot be read; send multipart/form-data") from odd
    if kind != b"multipart/form-data":
        raise BadRequest(f"an adapter arrives as multipart/form-data and not as `{shown(content_type)}`; {_BOTH}")
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:
        raise BadRequest("the Content-Type header has no usable boundary (1 to 70 characters); let your client set it")
    return boundary


def _both_there(folder: Path, form: _Form) -> None:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if not missing:
        return
    if form.files == 0:
        raise BadRequest(f"the form has no file; {_BOTH}", param="files")
    raise AdapterRejected(f"the upload has no {' and no '.join(missing)}; {_BOTH}")


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
    """What the parser's callbacks tell becomes fields, and writes that `flush` carries out."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.fields: dict[str, str] = {}
        self.files = 0
        self.archive = False
        self.card = bytearray()
        self.ended = False
        self.pending: list[tuple[IO[bytes], bytes]] = []
        self.pending_bytes = 0
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

    def flush(self) -> None:
        pending, self.pending, self.pending_bytes = self.pending, [], 0
        for sink, data in pending:
            _write(sink, data)

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise BadRequest(f"the form has more than {MAX_PARTS} parts; {_BOTH}")
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
        if part.filename in FILES:
            part.sink = self._keep(part.filename)
        elif part.filename == CARD:
            part.card = True
        elif not _beside(part.filename):
            if part.filename.lower().endswith(_PICKLE_ENDINGS):
                raise AdapterRejected(f"{shown(part.filename)} {_NO_PICKLES}")
            part.head = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.text is not None:
            part.text += data[start:end]
            if len(part.text) > MAX_FIELD_BYTES:
                raise TooLarge(f"the field `{shown(part.name)}` is above {MAX_FIELD_BYTES} bytes; send files as files")
        elif part.sink is not None:
            self._queue(part.sink, data[start:end])
        elif part.card:
            self.card += data[start:end][: CARD_BYTES - len(self.card)]
        elif part.head is not None:
            part.head += data[start:end]
            if len(part.head) >= _HEAD:
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
        if _archive_kind(head):
            if self.archive:
                raise BadRequest(f"the form has two archives; {_BOTH}", param="files")
            self.archive = True
            part.sink = self._keep(_ARCHIVE)
            self._queue(part.sink, head)
        elif (part.filename or "").lower().endswith(_ARCHIVE_ENDINGS):
            raise AdapterRejected(f"{shown(part.filename)} is neither a zip nor a tar archive; {_BOTH}")
        elif sniff(head) == "a Python pickle":
            raise AdapterRejected(f"{shown(part.filename)} {_NO_PICKLES}")

    def _keep(self, name: str) -> IO[bytes]:
        if name in self._kept:
            raise BadRequest(f"the form has {name} twice; {_BOTH}", param="files")
        self._kept.add(name)
        if _ARCHIVE in self._kept and len(self._kept) > 1:
            raise BadRequest(f"the form has an archive and loose files; {_BOTH}", param="files")
        return self.stack.enter_context(_create(self.folder / name))

    def _queue(self, sink: IO[bytes], data: bytes) -> None:
        self.pending.append((sink, data))
        self.pending_bytes += len(data)


# Archives


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _unpack(folder: Path, max_bytes: int, card: bool) -> None:
    path = folder / _ARCHIVE
    sink = _Unpacked(folder, max_bytes, card)
    try:
        with open(path, "rb") as file:
            kind = _archive_kind(file.read(_HEAD))
            file.seek(0)
            if kind == "zip":
                _unzip(file, sink)
            elif kind == "gzip":
                with gzip.GzipFile(fileobj=file, mode="rb") as inside:
                    _untar(inside, sink, max_bytes)
            else:
                _untar(file, sink, max_bytes)
    except (
        zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, zlib.error, EOFError, struct.error,
        ValueError, NotImplementedError, RuntimeError, IndexError, OverflowError, KeyError,
    ) as broken:  # fmt: skip
        raise AdapterRejected(f"the archive is damaged or cut short ({shown(broken)}); pack it again") from broken
    except OSError as failed:
        if failed.errno not in (None, errno.EINVAL):
            raise
        raise AdapterRejected("the archive is damaged or cut short; pack it again") from failed
    finally:
        path.unlink(missing_ok=True)


def _unzip(file: IO[bytes], sink: _Unpacked) -> None:
    _bound_directory(file)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            mode = info.external_attr >> 16
            plain = info.is_dir() or stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR)
            name = sink.name(info.orig_filename, plain=plain, folder=info.is_dir())
            if name is None:
                continue
            if info.flag_bits & 0x1:
                raise AdapterRejected(f"{shown(info.filename)} is encrypted; pack the archive without a password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise AdapterRejected("the archive is packed with something else than deflate; use plain zip or tar.gz")
            with archive.open(info) as member:
                sink.write(name, iter(lambda: member.read(_CHUNK), b""))


def _bound_directory(file: IO[bytes]) -> None:
    """zipfile reads the whole central directory into memory: look at its stated size first, where zipfile looks."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 22))
    end = file.read(22)
    if not (len(end) == 22 and end.startswith(b"PK\5\6") and end.endswith(b"\0\0")):
        start = max(0, size - 22 - 65535)
        file.seek(start)
        tail = file.read()
        at = tail.rfind(b"PK\5\6")
        if at < 0 or len(tail) - at < 22:
            raise zipfile.BadZipFile("it has no directory at its end")
        end, size = tail[at : at + 22], start + at + 22
    (entries, directory) = struct.unpack("<HI", end[10:16])
    file.seek(max(0, size - 22 - 20))
    if file.read(4) == b"PK\6\7":
        raise AdapterRejected("zip64 archives are not taken; send the two files themselves, or a tar.gz")
    if entries > MAX_ENTRIES or directory > 1 << 20:
        raise AdapterRejected(f"the archive has more than {MAX_ENTRIES} entries; {_BOTH}")
    file.seek(0)


def _untar(file: _Readable, sink: _Unpacked, max_bytes: int) -> None:
    """A tar, read once from front to end.

    `tarfile` takes extended headers of any stated size into memory, so their loop is ours; its header parser is not.
    """
    source = _Counted(file, max_bytes)
    longname: str | None = None
    for _ in range(4 * MAX_ENTRIES):
        block = source.read(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            return  # the end: a block of zeros, or of nothing
        if len(block) < tarfile.BLOCKSIZE:
            raise EOFError("it ends within a header")
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if info.size < 0:
            raise tarfile.HeaderError("a size below zero")
        if info.type in (b"x", b"X", b"g", b"L", b"K"):
            longname = _extended(source, info) or longname
            continue
        name = sink.name(longname or info.name, plain=info.type in (b"0", b"\0", b"7", b"5"), folder=info.type == b"5")
        longname = None
        content = source.member(0 if info.type == b"5" else info.size)
        if name is None:
            for _chunk in content:
                pass
        else:
            sink.write(name, content)
    raise AdapterRejected(f"the archive has more than {MAX_ENTRIES} entries; {_BOTH}")


def _extended(source: _Counted, info: tarfile.TarInfo) -> str | None:
    """The path that an extended header gives to the entry after it, if it does."""
    if info.size > _TAR_HEADER_BYTES:
        raise AdapterRejected("the archive has an oversized extended header; pack it again with plain tar")
    data = b"".join(source.member(info.size))
    if info.type == b"L":
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    if info.type in (b"K", b"g"):
        return None
    path = None
    while data.strip(b"\0"):
        length, blank, _ = data[:12].partition(b" ")
        size = int(length) if length.isdigit() and blank else 0
        if not len(length) + 1 < size <= len(data):
            raise tarfile.HeaderError("an extended header that cannot be read")
        key, _, value = data[len(length) + 1 : size].rstrip(b"\n").partition(b"=")
        if key == b"path":
            path = value.decode("utf-8", "surrogateescape")
        elif key == b"size" or key.startswith(b"GNU.sparse"):
            raise AdapterRejected("the archive has sparse or giant files; pack it again with plain tar")
        data = data[size:]
    return path


class _Counted:
    """The unpacked bytes of a tar, counted: a bomb is over at the limit, wherever in the archive it sits."""

    def __init__(self, file: _Readable, limit: int) -> None:
        self._file = file
        self._left = limit + 64 * tarfile.BLOCKSIZE * MAX_ENTRIES  # the headers themselves, beside the files
        self._limit = limit

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise _expanded(self._limit)
        return data

    def member(self, size: int) -> Iterator[bytes]:
        left, padding = size, -size % tarfile.BLOCKSIZE
        while left:
            chunk = self.read(min(left, _CHUNK))
            if not chunk:
                raise EOFError("it ends within a file")
            left -= len(chunk)
            yield chunk
        self.read(padding)


class _Unpacked:
    """Where the members of an archive go: two names, once each, and so many bytes together; the card's if asked."""

    def __init__(self, folder: Path, max_bytes: int, card: bool) -> None:
        self._folder = folder
        self._card = card
        self._left = self._limit = max_bytes
        self._entries = 0
        self._seen: set[str] = set()

    def name(self, stated: str, *, plain: bool, folder: bool) -> str | None:
        """The name to keep an entry under, or None to pass over it."""
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise AdapterRejected(f"the archive has more than {MAX_ENTRIES} entries; {_BOTH}")
        path = stated.replace("\\", "/")
        steps = [step for step in path.split("/") if step not in ("", ".")]
        if path.startswith("/") or ".." in steps or "\0" in path or (steps and steps[0].endswith(":")):
            raise AdapterRejected(
                f"the archive has an entry outside itself: `{shown(stated)}`; pack it again without that"
            )
        if not plain:
            raise AdapterRejected(f"the archive has a link or a device: `{shown(stated)}`; pack plain files only")
        if folder or not steps:
            return None
        base = steps[-1]
        if self._card and base == CARD and len(steps) <= 2 and CARD not in self._seen:
            self._seen.add(CARD)
            return CARD
        if base not in FILES:
            if base.lower().endswith(_PICKLE_ENDINGS) and not _beside(base):
                raise AdapterRejected(f"{shown(base)} {_NO_PICKLES}")
            return None
        if len(steps) > 2:
            raise AdapterRejected(
                f"`{shown(stated)}` lies too deep; pack {CONFIG} and {WEIGHTS} at the top or in one folder"
            )
        if base in self._seen:
            raise AdapterRejected(f"the archive has {base} twice; pack one adapter at a time")
        self._seen.add(base)
        return base

    def write(self, name: str, content: Iterator[bytes]) -> None:
        room = CARD_BYTES if name == CARD else self._limit
        with _create(self._folder / name) as sink:
            for chunk in content:
                self._left -= len(chunk)
                if self._left < 0:
                    raise _expanded(self._limit)
                _write(sink, chunk[:room])
                room -= len(chunk[:room])


def _archive_kind(head: bytes) -> str | None:
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if head[257:262] == b"ustar" or _is_old_tar(head):
        return "tar"
    return None


def _is_old_tar(head: bytes) -> bool:
    if len(head) < tarfile.BLOCKSIZE or not head[0]:
        return False
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _expanded(limit: int) -> TooLarge:
    return TooLarge(f"the archive unpacks to more than the {limit} bytes that this server takes")


# Small things


def _basename(filename: str) -> str:
    return filename.replace("\\", "/").rpartition("/")[2]


def _beside(filename: str) -> bool:
    return filename in _BESIDE or filename.startswith(_BESIDE_STARTS)


def _text(data: bytes, what: str) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as odd:
        raise BadRequest(f"{what} is not UTF-8; send text as UTF-8") from odd
    if "\0" in text:
        raise BadRequest(f"{what} has a zero byte; send text")
    return text


def _create(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb", buffering=0)


def _write(sink: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[sink.write(view) :]
    except OSError as full:
        if full.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutOfSpace("the disk is full; delete adapters or make room, then send it again") from full
