"""The contents of files: in a folder of this server, and where all servers of one registry keep what they share.

folder/<id>         whole or absent
folder/incoming/    what is being sent or written; gone when the server starts again
folder/answers/     of batches that are not at their end (answers.py)
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from serve.adapters.byte_ledger import Room
from serve.adapters.shared_store import PASSING, SharedStore
from serve.adapters.untrusted import create
from serve.errors import NotFound
from serve.files import fsync, rename

# A file without a row that is younger is about to get one.
GRACE_SECONDS = 3600.0


class FileBytes:
    """Sync and thread-safe. Whoever writes has room in the ledger for it."""

    def __init__(self, folder: Path, shared: SharedStore | None) -> None:
        self._folder = folder
        self._incoming = folder / "incoming"
        self._shared = shared
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(mode=0o700, parents=True)

    @contextmanager
    def incoming(self) -> Iterator[tuple[Path, IO[bytes]]]:
        """A private file to write, which is gone at the end unless it was kept."""
        path = self._incoming / secrets.token_hex(8)
        try:
            with create(path) as sink:
                yield path, sink
        finally:
            path.unlink(missing_ok=True)

    def keep(self, id: str, path: Path) -> None:
        """The incoming file is whole, and the content of `id` from now on, on every server."""
        fsync(path)
        if self._shared is not None:
            self._shared.put_file(id, path)
        rename(path, self._folder / id)

    def has(self, id: str) -> bool:
        """It can be read here."""
        return (self._folder / id).is_file() or (self._shared is not None and self._shared.has_file(id))

    def path(self, id: str) -> Path:
        """Where it can be read, once it is on this machine; NotFound if it is nowhere."""
        place = self._folder / id
        if place.is_file():
            return place
        if self._shared is None:
            raise NotFound(f"the content of {id} is not on this server", param="id")
        fetched = self._incoming / secrets.token_hex(8)
        try:
            self._shared.get_file(id, fetched)
            rename(fetched, place)
        finally:
            fetched.unlink(missing_ok=True)
        return place

    @property
    def is_shared(self) -> bool:
        """Other servers find files too."""
        return self._shared is not None

    def pass_on(self, id: str, path: Path) -> None:
        """Lay a file that has no row where all servers look, for a day at most."""
        assert self._shared is not None
        self._shared.put_file(PASSING + id, path)

    def receive(self, id: str, path: Path, room: Room) -> bool:
        """Bring a file that was passed on to this path, as far as the room has place for it; whether there was one."""
        assert self._shared is not None
        fetched = self._incoming / secrets.token_hex(8)
        try:
            room.take(self._shared.file_size(PASSING + id))
            self._shared.get_file(PASSING + id, fetched)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            rename(fetched, path)
        except NotFound:
            return False
        finally:
            fetched.unlink(missing_ok=True)
        return True

    def drop_passing(self, id: str) -> None:
        """It has arrived."""
        assert self._shared is not None
        self._shared.remove_file(PASSING + id)

    def remove(self, id: str) -> None:
        """Gone here, and where all servers look."""
        if self._shared is not None:
            self._shared.remove_file(id)
        (self._folder / id).unlink(missing_ok=True)

    def sweep(self, known: Collection[str], now: float | None = None) -> None:
        """Drop what no row names (any more): other servers' deletions, and what a kill left."""
        before = (time.time() if now is None else now) - GRACE_SECONDS
        for entry in self._folder.iterdir():
            if entry.is_file() and entry.name not in known and entry.stat().st_mtime < before:
                entry.unlink(missing_ok=True)
