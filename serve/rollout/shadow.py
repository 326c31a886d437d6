"""A candidate answers what the live version was asked, unseen by the client, for comparison only.

It begins when the real answer has ended, on its own lease, behind every client in the engine's queue, and few at a
time: what comes while all are busy is dropped and counted. Whatever happens to it happens to nobody else.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from serve.adapters.adapter import Adapter
from serve.adapters.store import Store
from serve.asgi.cancellation import CancellableCall
from serve.engine.engine import LOW_PRIORITY, Lease
from serve.engine.fleet import Fleet
from serve.errors import LoradockError

log = logging.getLogger(__name__)

# Whose answers can be compared.
PATHS = re.compile(r"/v1/(chat/completions|completions|responses|messages)")
MAX_ANSWER = 1 << 20
SECONDS = 300.0

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class ShadowExchange:
    """One request, as the engine got it, and two answers.

    `live` is as the client got it (a stream's events, if it asked for a stream). `name` holds the adapter's tenant; who
    asked may be of another, if the adapter is shared.
    """

    name: str
    live_version: int
    candidate_version: int
    path: str
    request: Mapping[str, Any]
    live: bytes
    candidate: bytes
    status: int
    seconds: float


class Kept:
    """Passes an answer on and remembers it, up to a size; beyond that there is nothing to compare."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._chunks: list[bytes] = []
        self._size = 0
        self.status = 0
        self.whole = False

    @property
    def body(self) -> bytes | None:
        return b"".join(self._chunks) if self.whole and self._size <= MAX_ANSWER else None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            chunk = message.get("body", b"")
            self._size += len(chunk)
            if self._size <= MAX_ANSWER:
                self._chunks.append(chunk)
            self.whole = not message.get("more_body", False)
        await self._send(message)


class Shadows:
    """At most `limit` answers at a time. `count(name, version, result)` counts; `on_shadow` gets the pairs."""

    def __init__(
        self,
        fleet: Fleet,
        store: Store,
        count: Callable[[str, str, str], None],
        on_shadow: Callable[[ShadowExchange], None] | None = None,
        *,
        limit: int = 2,
    ) -> None:
        self._fleet = fleet
        self._store = store
        self._count = count
        self._on_shadow = on_shadow
        self._limit = limit
        self._running: set[asyncio.Task[None]] = set()

    def offer(self, candidate: Adapter, live: int, scope: Scope, fields: Mapping[str, Any], kept: Kept) -> None:
        """Have `candidate` answer too, if the real answer is whole and there is room; never waits, never raises."""
        if kept.status != 200 or kept.body is None or not PATHS.fullmatch(scope["path"]) or fields.get("background"):
            return
        if len(self._running) >= self._limit:
            self._count(candidate.name, f"v{candidate.version}", "dropped")
            return
        task = asyncio.create_task(self._run(candidate, live, scope, fields, kept.body))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Break off what runs."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _run(self, candidate: Adapter, live: int, scope: Scope, fields: Mapping[str, Any], answer: bytes) -> None:
        result = "failed"
        try:
            began = time.perf_counter()
            async with asyncio.timeout(SECONDS):
                found = await self._answer(candidate, scope, fields)
            seconds = time.perf_counter() - began
            result = "answered" if found.status == 200 else "failed"
            if self._on_shadow:
                self._on_shadow(
                    ShadowExchange(
                        candidate.name,
                        live,
                        candidate.version,
                        scope["path"],
                        fields,
                        answer,
                        found.body or b"",
                        found.status,
                        seconds,
                    )
                )
        except (LoradockError, TimeoutError) as error:
            log.warning("the shadow %s did not answer: %s", candidate.tag, error or "it took too long")
        except Exception:  # nobody waits for this task: the hook's and the engine's errors end here
            log.exception("the shadow %s failed", candidate.tag)
        finally:
            self._count(candidate.name, f"v{candidate.version}", result)

    async def _answer(self, candidate: Adapter, scope: Scope, fields: Mapping[str, Any]) -> Kept:
        supervisor = self._fleet.of(candidate.name)
        path = await self._store.bring(candidate.digest)
        await supervisor.available()
        engine = supervisor.engine
        async with engine.lease(candidate.id, path, tenant=candidate.tenant, priority=LOW_PRIORITY) as lease:
            body = _encode(_unseen(fields, lease, scope["path"]))
            kept = Kept(_nowhere)
            call = CancellableCall(_sent(body), kept.send, engine.failing)
            with engine.alarm(call.cut):
                await call.run(engine.backend.app, _asking(scope, body))
            return kept


def _unseen(fields: Mapping[str, Any], lease: Lease, path: str) -> dict[str, Any]:
    """The same request for the candidate: in one piece, remembered nowhere, behind everybody."""
    asked = {key: value for key, value in fields.items() if key not in ("stream", "stream_options", "request_id")}
    asked |= {"model": lease.model, "stream": False}
    if path != "/v1/messages" and lease.priority is not None:
        asked["priority"] = lease.priority
    if path == "/v1/responses":
        asked["store"] = False
    return asked


def _asking(scope: Scope, body: bytes) -> Scope:
    length = (b"content-length", str(len(body)).encode())
    dropped = (
        b"content-length", b"transfer-encoding", b"x-request-id", b"x-data-parallel-rank", b"authorization",
        b"x-api-key",
    )  # fmt: skip
    headers = [header for header in scope["headers"] if header[0] not in dropped]
    return {**scope, "headers": [*headers, length], "state": dict(scope.get("state") or {})}


def _sent(body: bytes) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        return await asyncio.Future()  # a client that never leaves; it ends with its task

    return receive


async def _nowhere(message: Message) -> None:
    return None
