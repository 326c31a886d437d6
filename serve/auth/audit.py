"""The audit log: one JSON line for every change that somebody asked of this server, done or refused.

    {"when", "who", "tenant", "key", "what", "subject", "outcome", "status", "request_id", "remote"}

`outcome` is done, refused (4xx), failed (5xx) or aborted (the client left). Never keys, never bodies. `Audited` stands
before the routes, so that none can forget to be logged. Refusals of one key that repeat within a minute are one line
with how many they are (`repeated`) and since when.

    audit.jsonl                        where lines are appended
    audit-20261129T101112Z-1f.jsonl    what was rotated: by size, and with the month
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISREG
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.asgi.exchange import identified
from serve.auth.rate_limits import Bucket
from serve.events import Recorded
from serve.names import shown

log = logging.getLogger(__name__)

# Refusals of one key, route and status: so many a minute are lines of their own, the others are counted.
FOLD_SECONDS, FOLD_AFTER = 60.0, 5
# Refusals that are counted at a time.
_FOLDS = 1024
# Whoever has no key can make this many lines a minute and no more: they must not be able to fill the disk.
STRANGERS_PER_MINUTE = 60
_READS = {"GET", "HEAD", "OPTIONS"}


@dataclass(slots=True)
class _Fold:
    """Refusals that repeat: how many were lines, and how many more there were; `line` is the last of those."""

    since: float
    lines: int = 0
    repeated: int = 0
    last: float = 0.0
    line: dict[str, Any] = field(default_factory=dict)


class Audit:
    """Appends to a file of its own; a write that fails is logged and counted, and stops nobody.

    A file that would pass `max_bytes`, or whose month is over, is rotated (0: never; somebody else does), and deleted
    after `days`.
    """

    def __init__(
        self, path: Path, *, max_bytes: int = 64 << 20, days: int = 400, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self.failures = 0
        self._max_bytes = max_bytes
        self._days = days
        self._clock = clock
        self._folds: dict[tuple[Any, ...], _Fold] = {}
        self._strangers = Bucket(STRANGERS_PER_MINUTE, clock())
        self._omitted = 0
        self._lock = threading.Lock()

    def write(self, *, status: int, who: str | None, **fields: Any) -> None:
        """One line. `omitted` is how many lines of strangers were left out since the last one."""
        now = self._clock()
        with self._lock:
            if who is None:
                if self._strangers.wait(1, now):
                    self._omitted += 1
                    return
                self._strangers.take(1, now)
            self._end_folds(now)
            row = {"when": _iso(now), "who": who, **fields, "outcome": _outcome(status), "status": status}
            if not (_outcome(status) == "refused" and fields.get("key") and self._is_folded(row, now)):
                self._write(row, now)

    def record(self, event: Recorded) -> None:
        """The line of something that this server did by itself."""
        self.write(**event.audit_line())

    def flush(self, *, everything: bool = False) -> None:
        """Write the counts of refusals whose minute is over, and delete files whose time is. Blocks."""
        now = self._clock()
        with self._lock:
            self._end_folds(math.inf if everything else now)
        before = now - self._days * 86_400.0
        for file in self.path.parent.glob(f"{self.path.stem}-*{self.path.suffix}"):
            if self._max_bytes and file.stat().st_mtime < before:
                file.unlink(missing_ok=True)

    async def run(self) -> None:
        """`flush`, now and then."""
        while True:
            await asyncio.sleep(FOLD_SECONDS)
            await asyncio.to_thread(self.flush)

    def _is_folded(self, row: dict[str, Any], now: float) -> bool:
        """It is one of too many, and is counted instead of written."""
        same = (row["key"], row.get("what"), row["status"])
        if same not in self._folds and len(self._folds) >= _FOLDS:
            self._end_folds(math.inf)
        fold = self._folds.setdefault(same, _Fold(now))
        if fold.lines < FOLD_AFTER:
            fold.lines += 1
            return False
        if not fold.repeated:
            fold.since = now
        fold.repeated = fold.repeated + 1
        fold.last = now
        fold.line = row
        return True

    def _end_folds(self, now: float) -> None:
        for same, fold in list(self._folds.items()):
            if now - fold.since >= FOLD_SECONDS:
                del self._folds[same]
                if fold.repeated:
                    self._write({**fold.line, "repeated": fold.repeated, "since": _iso(fold.since)}, fold.last)

    def _write(self, row: dict[str, Any], now: float) -> None:
        if self._omitted:
            row["omitted"] = self._omitted
        try:
            self._append(json.dumps(row) + "\n", now)
            self._omitted = 0
        except OSError as error:
            self.failures += 1
            log.error("%s was not written (%s): %s", self.path, error.strerror, json.dumps(row))

    def _append(self, line: str, now: float) -> None:
        if self._max_bytes:
            self._rotate(len(line), now)
        # Opened each time: whoever rotates the file has nothing to tell this server.
        with open(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
            file.write(line)

    def _rotate(self, nbytes: int, now: float) -> None:
        """Begin another file, if there is a reason to. Another process that has this one open writes on into it."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return
        month = datetime.fromtimestamp(stat.st_mtime, UTC).timetuple()[:2]
        if stat.st_size + nbytes <= self._max_bytes and month >= datetime.fromtimestamp(now, UTC).timetuple()[:2]:
            return
        if S_ISREG(stat.st_mode) and stat.st_size:
            when = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
            name = f"{self.path.stem}-{when}-{secrets.token_hex(4)}{self.path.suffix}"
            with suppress(FileNotFoundError):  # another process was first
                self.path.rename(self.path.with_name(name))


class Audited:
    """Logs each request that is not a read and that a route took; the rest passes by.

    The route says more through `request.state`: `caller` is who asks, `subject` is what about, `reason` is why if they
    said so; `audited` is False of one that changed nothing, True of a read that gave weights away.
    """

    def __init__(self, app: ASGIApp, audit: Audit) -> None:
        self._app = app
        self._audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope, request_id = identified(scope)
        changes = scope["method"] not in _READS
        status = 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if changes:
                    MutableHeaders(scope=message)["x-request-id"] = request_id.echo
            await send(message)

        state = scope.setdefault("state", {})
        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            audited = state.get("audited", changes)
            if (endpoint := scope.get("endpoint")) and audited:
                caller = state.get("caller")
                line = {
                    "status": status,
                    "who": caller.name if caller else None,
                    "tenant": caller.tenant if caller else None,
                    "key": caller.key if caller else None,
                    "what": endpoint.__name__,
                    "subject": shown(state.get("subject") or _subject(scope), 256),
                    "request_id": request_id.echo,
                    "remote": (scope.get("client") or (None,))[0],
                }
                if reason := state.get("reason"):
                    line["reason"] = shown(reason, 500)
                await asyncio.shield(asyncio.to_thread(self._audit.write, **line))


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")


def _subject(scope: Scope) -> str:
    """What the path names, for a request that was refused before anybody looked."""
    return "@v".join(str(value) for value in scope.get("path_params", {}).values())


def _outcome(status: int) -> str:
    if status < 400:
        return "done"
    return "aborted" if status == 499 else "refused" if status < 500 else "failed"
