"""The audit log: one JSON line for every change that somebody asked of this server, done or refused.

    {"when", "who", "tenant", "key", "what", "subject", "outcome", "status", "request_id", "remote"}

`outcome` is done, refused (4xx), failed (5xx) or aborted (the client left). Never keys, never bodies. `Audited` stands
before the routes, so that none can forget to be logged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.asgi.exchange import identified
from serve.auth.rate_limits import Bucket
from serve.names import shown

log = logging.getLogger(__name__)

# Whoever has no key can make this many lines a minute and no more: they must not be able to fill the disk.
STRANGERS_PER_MINUTE = 60
_READS = {"GET", "HEAD", "OPTIONS"}


class Audit:
    """Appends to a file of its own; a write that fails is logged and counted, and stops nobody."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.failures = 0
        self._clock = clock
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
            when = datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds")
            row = {"when": when, "who": who, **fields, "outcome": _outcome(status), "status": status}
            if self._omitted:
                row["omitted"] = self._omitted
            try:
                self._append(json.dumps(row) + "\n")
                self._omitted = 0
            except OSError as error:
                self.failures += 1
                log.error("%s was not written (%s): %s", self.path, error.strerror, json.dumps(row))

    def _append(self, line: str) -> None:
        # Opened each time: whoever rotates the file has nothing to tell this server.
        with open(os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
            file.write(line)


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


def _subject(scope: Scope) -> str:
    """What the path names, for a request that was refused before anybody looked."""
    return "@v".join(str(value) for value in scope.get("path_params", {}).values())


def _outcome(status: int) -> str:
    if status < 400:
        return "done"
    return "aborted" if status == 499 else "refused" if status < 500 else "failed"
