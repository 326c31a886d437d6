"""Adapter bytes where several servers find them: a folder by URL, as s3://bucket/prefix or file:///shared, by fsspec.

    URL/<digest>/adapter_config.json, adapter_model.safetensors
    URL/files/<id>                       what batches read and wrote
    URL/files/passing.<id>               on its way from one server to another; gone after a day

A version is registered once both are there. What no version names any more stays for a day: another server may be
about to register the same bytes again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from serve.adapters.adapter import FILES
from serve.errors import ConfigError, EngineUnavailable, LoradockError, NotFound
from serve.files import fsync, rename
from serve.names import shown

GRACE_SECONDS = 86_400.0
# Not a digest, so no sweep of adapters touches it.
FILES_FOLDER = "files"
PASSING = "passing."


class SharedStore:
    """Sync and thread-safe; every call meets the network."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._system, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(
                f"blobs takes a folder by URL, as s3://bucket/prefix or file:///shared: {shown(url)} is not one that "
                f"can be opened here ({shown(error)})"
            ) from error

    def put(self, digest: str, folder: Path) -> None:
        """Both files of a blob, each whole or not at all; once more, if they are there already."""
        with self._translated(digest):
            self._system.makedirs(f"{self._root}/{digest}", exist_ok=True)
            for name in FILES:
                self._put_file(folder / name, f"{self._root}/{digest}/{name}")

    def get(self, digest: str, folder: Path) -> None:
        """Both files into `folder`; NotFound if there are none. Who asked looks whether they are the right ones."""
        with self._translated(digest):
            for name in FILES:
                self._system.get_file(f"{self._root}/{digest}/{name}", str(folder / name))

    def has(self, digest: str) -> bool:
        """Both files are there."""
        with self._translated(digest):
            return all(self._system.exists(f"{self._root}/{digest}/{name}") for name in FILES)

    def sweep(self, known: Collection[str], now: float | None = None) -> int:
        """Remove what nobody has named for a day; how many that were."""
        before = (time.time() if now is None else now) - GRACE_SECONDS
        count = 0
        with self._translated("the folder"):
            if not self._system.exists(self._root):
                return 0
            for place in self._system.ls(self._root, detail=False):
                if (digest := place.rstrip("/").rpartition("/")[2]) in known or len(digest) != 64:
                    continue
                files = self._system.ls(place, detail=False)
                if all(self._system.modified(file).timestamp() < before for file in files):
                    self._system.rm(place, recursive=True)
                    count += 1
            return count + self._sweep_passing(before)

    def _sweep_passing(self, before: float) -> int:
        """Remove what was on its way and never arrived; how much that was."""
        folder = f"{self._root}/{FILES_FOLDER}"
        files = self._system.ls(folder, detail=False) if self._system.exists(folder) else []
        passing = [file for file in files if file.rpartition("/")[2].startswith(PASSING)]
        old = [file for file in passing if self._system.modified(file).timestamp() < before]
        for file in old:
            self._system.rm_file(file)
        return len(old)

    def put_file(self, id: str, path: Path) -> None:
        """A batch's file, whole or not at all."""
        with self._translated(id):
            self._system.makedirs(f"{self._root}/{FILES_FOLDER}", exist_ok=True)
            self._put_file(path, f"{self._root}/{FILES_FOLDER}/{id}")

    def get_file(self, id: str, path: Path) -> None:
        """NotFound, if there is none."""
        with self._translated(id):
            self._system.get_file(f"{self._root}/{FILES_FOLDER}/{id}", str(path))

    def file_size(self, id: str) -> int:
        """NotFound, if there is none."""
        with self._translated(id):
            return int(self._system.size(f"{self._root}/{FILES_FOLDER}/{id}"))

    def has_file(self, id: str) -> bool:
        with self._translated(id):
            return bool(self._system.exists(f"{self._root}/{FILES_FOLDER}/{id}"))

    def remove_file(self, id: str) -> None:
        """Once more, if it is gone already."""
        with self._translated(id):
            if self._system.exists(place := f"{self._root}/{FILES_FOLDER}/{id}"):
                self._system.rm_file(place)

    def _put_file(self, source: Path, place: str) -> None:
        if not isinstance(self._system, fsspec.get_filesystem_class("file")):
            self._system.put_file(str(source), place)  # an object store shows an object once it is whole
            return
        staged = f"{place}.{secrets.token_hex(4)}"
        self._system.put_file(str(source), staged)
        fsync(Path(staged))
        rename(Path(staged), Path(place))

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except LoradockError:
            raise
        except FileNotFoundError as lost:
            raise NotFound(f"nothing is kept under {what} in {shown(self.url)}") from lost
        except Exception as failed:  # each filesystem has its own errors, and none of them is ours to know
            reason: Any = failed.__cause__ or failed
            raise EngineUnavailable(
                f"the adapters' shared folder {shown(self.url)} did not answer ({shown(reason)}): retry shortly"
            ) from failed
