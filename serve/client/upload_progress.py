"""How far an upload has come, told while httpx reads its files."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

Progress = Callable[[int, int], None]


class UploadProgress:
    """Bytes of all files of one attempt."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._sent = 0
        self.add(0)

    def add(self, count: int) -> None:
        self._sent += count
        if self._progress is not None:
            self._progress(self._sent, self._total)


class CountedFile:
    """A file that tells how much of it was read; without `fileno`, so that httpx measures it by seeking."""

    def __init__(self, file: BinaryIO, counter: UploadProgress) -> None:
        self._file = file
        self._counter = counter
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._counter.add(len(data))
        return data
