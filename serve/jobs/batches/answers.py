"""Answers of batches that are not at their end: files of lines, beside rows that say how much of each file counts.

folder/<part>       LINE 1|0 ANSWER: the line of the input, whether it was completed, its line of the output or errors

An answer is appended to a file, is on the disk for good, and counts once the row says so, in the transaction with the
batch's counts that only the server with the claim can make. What a kill left behind that is cut off, and its line is
asked again: so no line is lost, and none comes twice. Each claim writes parts of its own; where servers share what they
keep, another one fetches them.
"""

from __future__ import annotations

import heapq
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serve.adapters.byte_ledger import ByteLedger, Kind, Room, Rooms
from serve.adapters.shared_store import SharedStore
from serve.adapters.untrusted import create, write
from serve.errors import NotFound
from serve.files import fsync, rename
from serve.jobs.batches.batch_rows import Answer, BatchRows
from serve.jobs.batches.file_bytes import GRACE_SECONDS
from serve.jobs.batches.objects import Batch

log = logging.getLogger(__name__)

# A part that has so many bytes is followed by another one: where servers share them, each answer sends its part again.
PART_BYTES = 1 << 20


class AnswerFiles:
    """Of all batches, in a folder of this server; `shared` is where other servers find them too. All methods block."""

    def __init__(self, folder: Path, shared: SharedStore | None, rows: BatchRows, ledger: ByteLedger) -> None:
        self.folder = folder
        self.shared = shared
        self.rows = rows
        self.rooms = Rooms(ledger, Kind.ANSWERS)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._count()

    def _count(self) -> None:
        """At start: what is here, by tenant; what no row names any more goes."""
        there = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        for part in self.rows.all_parts():
            if nbytes := there.pop(part.name, 0):
                room = self.rooms.of(part.batch, part.tenant)
                room.count(room.written + nbytes)
        for name in there:
            (self.folder / name).unlink(missing_ok=True)

    def of(self, batch: Batch) -> BatchAnswers:
        """For the server that has just claimed it."""
        return BatchAnswers(self, batch, self.rooms.of(batch.id, batch.tenant))

    def remove(self, batch: str, parts: list[str]) -> None:
        """The batch is at its end, and its answers are files."""
        for name in parts:
            (self.folder / name).unlink(missing_ok=True)
            if self.shared is not None:
                self.shared.remove_file(name)
        self.rooms.close(batch)

    def sweep(self) -> None:
        """Drop what belongs to batches that another server brought to their end."""
        rooms, parts = self.rooms.ids, list(self.rows.all_parts())
        batches, names = {part.batch for part in parts}, {part.name for part in parts}
        for over in rooms - batches - {batch.id for batch in self.rows.open()}:
            self.rooms.close(over)
        before = time.time() - GRACE_SECONDS  # a younger part may be about to get its row
        for path in self.folder.iterdir():
            if path.name not in names and path.stat().st_mtime < before:
                path.unlink(missing_ok=True)


@dataclass(slots=True)
class _Open:
    """The part that is written; `nbytes` of it count."""

    name: str
    sink: int
    nbytes: int = 0


class BatchAnswers:
    """Of one batch, as long as this server has its claim. From any thread."""

    def __init__(self, files: AnswerFiles, batch: Batch, room: Room) -> None:
        self._files = files
        self._batch = batch
        self._room = room
        self._part: _Open | None = None
        # An answer of which the database did not say whether it counts: its line, and the part with and without it.
        self._doubted: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self.lines: set[int] = set()
        self._read()

    def keep(self, answer: Answer) -> bool:
        """The answer counts; False, if the claim is another's by now. The second one to a line is dropped.

        QuotaExceeded, if the tenant has no room for it.
        """
        data = b"%d %d %s\n" % (answer.line, answer.completed, answer.text.encode())
        with self._lock:
            self._resolve()
            if answer.line in self.lines:
                return True
            self._room.take(len(data))
            part = self._opened()
            try:
                os.lseek(part.sink, part.nbytes, os.SEEK_SET)
                with os.fdopen(os.dup(part.sink), "wb", buffering=0) as sink:
                    write(sink, data)
                os.fsync(part.sink)
                if self._files.shared is not None:
                    self._files.shared.put_file(part.name, self._files.folder / part.name)
            except BaseException:
                os.ftruncate(part.sink, part.nbytes)
                self._room.give_back(len(data))
                raise
            self._doubted = (answer.line, part.nbytes + len(data))
            if not self._files.rows.record(self._batch.id, answer, part.name, part.nbytes + len(data)):
                return False
            self._counted()
            return True

    def answers(self, *, completed: bool) -> Iterator[str]:
        """Lines of the output or of the errors, in the input's order."""
        old = self._files.rows.old_answers(self._batch.id, completed=completed)
        yield from (text for _, text in heapq.merge(old, self._in_order(completed)))

    def _in_order(self, completed: bool) -> Iterator[tuple[int, str]]:
        found = [(line, path, at) for path, line, at, was in self._scanned() if was == completed]
        for line, path, at in sorted(found):
            with path.open("rb") as file:
                file.seek(at)
                yield line, file.readline().split(b" ", 2)[2].removesuffix(b"\n").decode()

    def close(self) -> None:
        """Nothing more is written."""
        with self._lock:
            if self._part is not None:
                os.close(self._part.sink)
            self._part = None

    def parts(self) -> list[str]:
        """Their names."""
        return [path.name for path, _ in self._parts()]

    def _read(self) -> None:
        """What was answered before; where a part is gone, its lines are asked again."""
        counts = {True: 0, False: 0}
        self._room.count(sum(nbytes for _, nbytes in self._parts()))  # before any of them is fetched
        for line, completed in self._files.rows.old_lines(self._batch.id):
            self.lines.add(line)
            counts[completed] += 1
        for _, line, _, completed in self._scanned():
            self.lines.add(line)
            counts[completed] += 1
        self._room.count(sum(path.stat().st_size for path, _ in self._parts() if path.exists()))
        if (counts[True], counts[False]) != (self._batch.completed, self._batch.failed):
            log.warning("answers of %s are not here any more: its lines are asked again", self._batch.id)
            self._files.rows.recount(self._batch.id, counts[True], counts[False])

    def _parts(self) -> list[tuple[Path, int]]:
        """The parts and how many bytes of each count."""
        return [(self._files.folder / part.name, part.nbytes) for part in self._files.rows.parts(self._batch.id)]

    def _scanned(self) -> Iterator[tuple[Path, int, int, bool]]:
        """Part, line, place and whether it was completed, of every answer that counts."""
        for path, nbytes in self._parts():
            self._fetch(path, nbytes)
            if not path.exists():
                continue
            with path.open("rb") as file:
                at = 0
                while at < nbytes and (row := file.readline()).endswith(b"\n"):
                    line, completed, _ = row.split(b" ", 2)
                    yield path, int(line), at, completed == b"1"
                    at += len(row)

    def _fetch(self, path: Path, nbytes: int) -> None:
        """From where all servers look, if it is not whole here."""
        if self._files.shared is None or (path.exists() and path.stat().st_size >= nbytes):
            return
        fetched = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            self._files.shared.get_file(path.name, fetched)
            rename(fetched, path)
        except NotFound:
            pass
        finally:
            fetched.unlink(missing_ok=True)

    def _opened(self) -> _Open:
        if self._part is not None and self._part.nbytes >= PART_BYTES:
            os.close(self._part.sink)
            self._part = None
        if self._part is None:
            name = f"answers-{secrets.token_hex(12)}"
            with create(self._files.folder / name) as new:
                self._part = _Open(name, os.dup(new.fileno()))
            fsync(self._files.folder)
        return self._part

    def _resolve(self) -> None:
        """Whether the last answer counts, if the database did not say so."""
        if self._doubted is None or self._part is None:
            return
        _, nbytes = self._doubted
        counts = {part.name: part.nbytes for part in self._files.rows.parts(self._batch.id)}
        if counts.get(self._part.name) == nbytes:
            self._counted()
            return
        os.ftruncate(self._part.sink, self._part.nbytes)
        self._room.give_back(nbytes - self._part.nbytes)
        self._doubted = None

    def _counted(self) -> None:
        assert self._doubted is not None and self._part is not None
        line, self._part.nbytes = self._doubted
        self.lines.add(line)
        self._doubted = None
