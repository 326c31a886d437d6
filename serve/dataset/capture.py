"""What was asked and answered, as text on the disk, for `loradock optimize` to calibrate on; only when it is asked for.

One file of JSON lines an hour, `{"adapter": ..., "tenant": ..., "id": ..., "text": ...}`: the prompt as the model saw
it (chat template and all) and its answer, with what `redact` matches blacked out. A file takes no more than `limit`
bytes, and is deleted `hours` after its hour has ended, with or without traffic. Each line is on its tenant's account.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from serve.adapters.byte_ledger import ByteLedger, Kind, Rooms
from serve.asgi.exchange import Exchange
from serve.errors import OutOfSpace, QuotaExceeded
from serve.files import write_whole
from serve.models.decoding import Decoder

# Exchanges that wait to be written: whole prompts, so not many.
QUEUE_SIZE = 256
HOUR = 3600

log = logging.getLogger(__name__)


class Capture:
    """An observer of an exchange worker. `model_of` gives an adapter's or base's checkpoint folder.

    `enabled`: without it nothing is written, but what was captured before is still deleted in time.
    """

    def __init__(
        self,
        folder: Path,
        model_of: Callable[[str], str],
        ledger: ByteLedger | None = None,
        *,
        enabled: bool = True,
        redact: Sequence[str] = (),
        hours: float = 24.0,
        limit: int = 16 << 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = folder
        self._model_of = model_of
        self._limit = limit
        self._redact = [re.compile(pattern) for pattern in redact]
        self._enabled = enabled
        self._hours = hours
        self._clock = clock
        self._decoders: dict[str, Decoder] = {}
        self._changing = threading.Lock()
        # Lines, with their tenants, that are written together: to write each by itself costs as much as to make it.
        self._lines: list[tuple[str, bytes]] = []
        # The file of this hour, and its size; closed every minute, so that one that was deleted begins again.
        self._file: BinaryIO | None = None
        self._size = self._opened = 0
        self._rooms = Rooms(ledger, Kind.TEXT) if ledger else None
        # By file: the bytes of each tenant.
        self._sizes: dict[str, Counter[str]] = {}
        # Exchanges that were left out because their hour's file is full, or their tenant has no more room.
        self.dropped = 0

    def start(self) -> None:
        """Make the folder, readable by its owner alone, delete old files, and count what is there."""
        if self._enabled:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder.chmod(0o700)
        self.save()
        with self._changing:
            self._sizes = {file.stem: _sizes(file) for file in self._folder.glob("*.jsonl")}
            self._recount()

    def observe(self, exchange: Exchange) -> None:
        """Note one answered request; `looked` writes it."""
        if not self._enabled or exchange.status != 200 or not exchange.generations:
            return
        try:
            line = self._line(exchange)
        except Exception as error:  # a tokenizer that is not there: traffic goes on
            log.warning("a request was not captured: %s", error)
            return
        with self._changing:
            self._lines.append((exchange.tenant, line))

    def looked(self) -> None:
        """Write what was noted."""
        with self._changing:
            self._write()

    def save(self) -> None:
        """Delete the files whose time is over."""
        with self._changing:
            self._close()
            for file in self._folder.glob("*.jsonl"):
                if file.stem.isdigit() and int(file.stem) < self._hour - self._hours:
                    file.unlink(missing_ok=True)
                    self._sizes.pop(file.stem, None)
            self._recount()

    def stop(self) -> None:
        """Write the rest."""
        with self._changing:
            self._close()

    def forget(self, tenant: str, ids: Collection[str]) -> None:
        """Delete these requests of a tenant's. From any thread."""
        with self._changing:
            self._close()
            for file in self._folder.glob("*.jsonl"):
                lines = file.read_bytes().splitlines(keepends=True)
                kept = [line for line in lines if not _is_of(line, tenant, ids)]
                if len(kept) < len(lines):
                    write_whole(file, b"".join(kept))
                    self._sizes[file.stem] = _sizes(file)
            self._recount()

    @property
    def _hour(self) -> int:
        return int(self._clock() // HOUR)

    def _line(self, exchange: Exchange) -> bytes:
        decode = self._decoder(self._model_of(exchange.adapter))
        generation = exchange.generations[0]
        text = decode([*generation.prompt, *generation.output], special=True)
        for pattern in self._redact:
            text = pattern.sub("[redacted]", text)
        row = {"adapter": exchange.adapter, "tenant": exchange.tenant, "id": exchange.request_id, "text": text}
        return msgspec.json.encode(row) + b"\n"

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        if not lines:
            return
        try:
            file = self._open()
            room = self._limit - self._size
            fitting = list[bytes]()
            for tenant, line in lines:
                if len(line) <= room and self._has_room(tenant, len(line)):
                    fitting.append(line)
                    room -= len(line)
            self.dropped += len(lines) - len(fitting)
            data = b"".join(fitting)
            if (taken := file.write(data)) < len(data):
                self._size += data.rfind(b"\n", 0, taken) + 1
                file.truncate(self._size)
                raise OSError(errno.ENOSPC, "the disk took a part of the lines only")
            self._size += len(data)
        except OSError as error:  # a full disk: traffic goes on
            log.warning("requests were not captured: %s", error)
            if self._file is not None:
                self._sizes[str(self._opened)] = _sizes(Path(self._file.name))
            self._recount()

    def _has_room(self, tenant: str, nbytes: int) -> bool:
        """Whether the tenant may have so many bytes more; they are counted then."""
        try:
            if self._rooms is not None:
                self._rooms.of(tenant, tenant).take(nbytes)
        except (QuotaExceeded, OutOfSpace):
            return False
        self._sizes.setdefault(str(self._opened), Counter())[tenant] += nbytes
        return True

    def _recount(self) -> None:
        """Tell the ledger what the files have."""
        if self._rooms is None:
            return
        totals = sum(self._sizes.values(), Counter[str]())
        for tenant in {*totals, *self._rooms.ids}:
            self._rooms.of(tenant, tenant).count(totals[tenant])

    def _open(self) -> BinaryIO:
        """The file of this hour; unbuffered, so that a line that a full disk cuts short can be taken back."""
        hour = self._hour
        if self._file is None or self._opened != hour:
            self._close()
            self._file = (self._folder / f"{hour}.jsonl").open("ab", buffering=0)
            self._size, self._opened = self._file.seek(0, os.SEEK_END), hour
        return self._file

    def _close(self) -> None:
        self._write()
        if self._file is not None:
            self._file.close()
        self._file = None

    def _decoder(self, model: str) -> Decoder:
        if model not in self._decoders:
            self._decoders[model] = Decoder(Path(model) / "tokenizer.json")
        return self._decoders[model]


class _Owned(msgspec.Struct):
    tenant: str


_owner = msgspec.json.Decoder(_Owned).decode


def _sizes(file: Path) -> Counter[str]:
    """The bytes of each tenant's lines."""
    sizes: Counter[str] = Counter()
    with file.open("rb") as lines:
        for line in lines:
            with suppress(msgspec.DecodeError):  # a power failure cut it short, or an earlier release wrote it
                sizes[_owner(line).tenant] += len(line)
    return sizes


def _is_of(line: bytes, tenant: str, ids: Collection[str]) -> bool:
    try:
        row = json.loads(line)
    except ValueError:  # a power failure cut it short
        return False
    return row.get("tenant") == tenant and row.get("id") in ids
