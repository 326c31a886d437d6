"""Files and folders that are whole or absent: written under another name, fsynced, renamed, the rename fsynced.

After a kill or a power failure a reader finds the old content or the new one. And SQLite's files, which several servers
open at once. Imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 20
_PAUSE = 0.005  # seconds between two tries to turn WAL mode on


def write_whole(path: Path, data: bytes) -> None:
    """Replace the content of `path`; whoever reads meanwhile gets the old content or the new one."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with staged.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        rename(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def append_whole(path: Path, data: bytes) -> None:
    """Add to the end of a private file, for good."""
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Rename for good: both folders are fsynced. `source` itself must be on the disk already (`fsync`)."""
    os.replace(source, target)
    fsync(target.parent)
    if source.parent != target.parent:
        fsync(source.parent)


def digest(files: Iterable[tuple[str, BinaryIO]], rest: Callable[[], object] = lambda: None) -> str:
    """sha256 over each file, in the order given: the length of its name, its name, its length, its bytes.

    `rest()` is called between two pieces.
    """
    total = hashlib.sha256()
    for name, file in files:
        encoded = name.encode()
        total.update(len(encoded).to_bytes(8, "little") + encoded)
        total.update(os.fstat(file.fileno()).st_size.to_bytes(8, "little"))
        while chunk := file.read(_CHUNK):
            total.update(chunk)
            rest()
    return total.hexdigest()


def fsync(path: Path) -> None:
    """Bring the bytes of a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Bring a folder, and all that is below it, to the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            fsync(Path(place) / name)
        fsync(Path(place))


def write_ahead(database: sqlite3.Connection, patience: float) -> None:
    """Turn WAL mode on, so that who reads and who writes wait for nobody.

    The file's first two connections would wait for each other's locks to turn it on, so that SQLite tells one of them
    "database is locked" at once, whatever its busy timeout is (https://www.sqlite.org/rescode.html#busy). It is asked
    again for `patience` seconds, until the other one is done.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            database.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE)
