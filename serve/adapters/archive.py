"""An archive of an adapter (zip, tar, gzip, zstd), unpacked as untrusted bytes: files of two names, so many bytes."""

from __future__ import annotations

import errno
import gzip
import io
import math
import re
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from serve.adapters.adapter import CONFIG, FILES, NOTES, WEIGHTS
from serve.adapters.file_thread import rest
from serve.adapters.shards import is_shard
from serve.adapters.tensors import header_length
from serve.adapters.untrusted import BOTH_FILES, NO_PICKLES, create, is_pickle, write
from serve.errors import AdapterRejected, TooLarge
from serve.names import shown

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_ENTRIES = 1000
HEAD_BYTES = 512  # what `archive_kind` wants to see

_CHUNK = 256 << 10
_TAR_HEADER_BYTES = 64 << 10
# What unpacking may take of the memory: 2 to its power, in bytes. The command zstd goes as far by itself.
_ZSTD: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 27}
_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,9})")
# The last three are zipfile's, of names, flags and offsets that it cannot take.
_DAMAGED = (
    zipfile.BadZipFile, gzip.BadGzipFile, tarfile.TarError, zlib.error, zstd.ZstdError, EOFError,
    ValueError, RuntimeError, OverflowError,
)  # fmt: skip


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def unpack(path: Path, take: Callable[[int], None] = lambda nbytes: None, *, max_bytes: int) -> None:
    """Put an adapter's files and its notes beside the archive `path`; the archive is removed.

    `take(nbytes)` hears of bytes that are about to be written, and may refuse them.
    """
    sink = _Unpacked(path.parent, max_bytes, take)
    try:
        with open(path, "rb") as file:
            kind = archive_kind(file.read(HEAD_BYTES))
            file.seek(0)
            if kind == "zip":
                _unzip(file, sink)
            elif kind == "gzip":
                with gzip.GzipFile(fileobj=file, mode="rb") as inside:
                    _untar(inside, sink, max_bytes)
            elif kind == "zstd":
                with zstd.ZstdFile(file, "rb", options=_ZSTD) as inside:
                    _untar(inside, sink, max_bytes)
            else:
                _untar(file, sink, max_bytes)
    except _DAMAGED as broken:
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
        entries = archive.infolist()
        judge = sink.empty()
        for info in entries:  # all of them by what the directory says, before the first is unpacked
            _zip_name(info, judge)
        for info in entries:
            if name := _zip_name(info, sink):
                with archive.open(info) as member:
                    sink.write(name, iter(partial(member.read, _CHUNK), b""))


def _zip_name(info: zipfile.ZipInfo, sink: _Unpacked) -> str | None:
    mode = info.external_attr >> 16
    folder = info.filename.endswith("/")
    plain = folder or stat.S_IFMT(mode) in (0, stat.S_IFREG, stat.S_IFDIR)
    name = sink.name(info.orig_filename, plain=plain, folder=folder)
    if name is None:
        return None
    if info.flag_bits & 0x1:
        raise AdapterRejected(f"{shown(info.filename)} is encrypted; pack the archive without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise AdapterRejected("the archive is packed with something else than deflate; use plain zip or tar.gz")
    return name


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
        raise AdapterRejected(f"the archive has more than {MAX_ENTRIES} entries; {BOTH_FILES}")
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
    raise AdapterRejected(f"the archive has more than {MAX_ENTRIES} entries; {BOTH_FILES}")


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
    """Where the members of an archive go: known names, once each, and so many bytes together."""

    def __init__(self, folder: Path, max_bytes: int, take: Callable[[int], None]) -> None:
        self._folder, self._take = folder, take
        self._left = self._limit = max_bytes
        self._entries = 0
        self._seen: set[str] = set()
        self._rank = -1.0

    def empty(self) -> _Unpacked:
        """Another into which nothing has come yet."""
        return _Unpacked(self._folder, self._limit, self._take)

    def name(self, stated: str, *, plain: bool, folder: bool) -> str | None:
        """The name to keep an entry under, or None to pass over it."""
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise AdapterRejected(f"the archive has more than {MAX_ENTRIES} entries; {BOTH_FILES}")
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
        *folders, base = steps
        checkpoint, below = _checkpoint(folders)
        if base in NOTES and len(folders) <= 1 + (checkpoint is not None) and base not in self._seen:
            self._seen.add(base)
            return base
        if below:
            return None  # what a trainer keeps beside a checkpoint's adapter
        if base not in FILES and not is_shard(base):
            if is_pickle(base):
                raise AdapterRejected(f"{shown(base)} {NO_PICKLES}")
            return None
        if len(folders) > 1 + (checkpoint is not None):
            raise AdapterRejected(
                f"`{shown(stated)}` lies too deep; pack {CONFIG} and {WEIGHTS} at the top or in one folder"
            )
        if not self._prefers(math.inf if checkpoint is None else checkpoint):
            return None
        if base in self._seen:
            raise AdapterRejected(f"the archive has {base} twice; pack one adapter at a time")
        self._seen.add(base)
        return base

    def _prefers(self, rank: float) -> bool:
        """Whether files of this rank are kept: the final adapter before checkpoints, a later checkpoint before others.

        An archive is read once, so that files of a lower rank may be here already: they go.
        """
        if rank > self._rank:
            for name in self._seen - {*NOTES}:
                (self._folder / name).unlink(missing_ok=True)
            self._rank = rank
            self._left = self._limit
            self._seen = self._seen & {*NOTES}
        return rank == self._rank

    def write(self, name: str, content: Iterator[bytes]) -> None:
        room = NOTES.get(name, self._limit)
        weights = name == WEIGHTS or is_shard(name)
        with create(self._folder / name) as sink:
            for number, chunk in enumerate(content):
                if weights and number == 0:
                    header_length(chunk, name)
                rest()
                self._left -= len(chunk)
                if self._left < 0:
                    raise _expanded(self._limit)
                self._take(len(chunk[:room]))
                write(sink, chunk[:room])
                room -= len(chunk[:room])


def _checkpoint(folders: list[str]) -> tuple[int | None, list[str]]:
    """The number of the training checkpoint that a folder belongs to, and the folders below that checkpoint's."""
    for at, folder in enumerate(folders):
        if match := _CHECKPOINT.fullmatch(folder):
            return int(match[1]), folders[at + 1 :]
    return None, []


def archive_kind(head: bytes) -> str | None:
    """zip, gzip, zstd or tar, from the first HEAD_BYTES of a file."""
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd"
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
