"""Asks an engine's app from inside this server, where no client waits: a shadow's answer, a baseline's.

The request has none of a client's headers, so no key, no priority and no rank of theirs reaches the app.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.asgi.cancellation import CancellableCall
from serve.asgi.exchange import Watch, watching
from serve.errors import EngineUnavailable, LoradockError

_encode = msgspec.json.Encoder().encode


class App(Protocol):
    """Whoever computes."""

    @property
    def app(self) -> ASGIApp: ...


class AnsweringEngine(Protocol):
    """What the client needs of an engine."""

    @property
    def backend(self) -> App: ...
    def failing(self) -> LoradockError | None: ...
    def alarm(self, ring: Callable[[EngineUnavailable], None]) -> AbstractContextManager[None]: ...


class AnsweringLease(Protocol):
    """A seat with an engine, whose payer is charged for what is left with a watch."""

    @property
    def engine(self) -> AnsweringEngine: ...
    def watched(self, watch: Watch) -> AbstractContextManager[None]: ...


class RecordedAnswer:
    """Keeps an answer as it passes through `send`, up to `limit` bytes; a longer one has no `body`."""

    def __init__(self, limit: int, send: Send | None = None) -> None:
        self._limit = limit
        self._send = send
        self._chunks: list[bytes] = []
        self._size = 0
        self.status = 0
        self._complete = False

    @property
    def body(self) -> bytes | None:
        """The whole body; None if it was cut short or is above the limit."""
        return b"".join(self._chunks) if self._complete and self._size <= self._limit else None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            chunk = message.get("body", b"")
            self._size += len(chunk)
            if self._size <= self._limit:
                self._chunks.append(chunk)
            self._complete = not message.get("more_body", False)
        if self._send:
            await self._send(message)


async def post(
    lease: AnsweringLease, path: str, fields: Mapping[str, Any], *, limit: int, watch: Watch
) -> RecordedAnswer:
    """The answer of the engine's app; the engine's own error if it fails. What it generates is left with `watch`."""
    body, engine = _encode(fields), lease.engine
    answer = RecordedAnswer(limit)
    call = CancellableCall(_receiving(body), answer.send, engine.failing)
    with lease.watched(watch), engine.alarm(call.cut):
        await call.run(engine.backend.app, _scope(path, body))
    return answer


async def render(
    engine: AnsweringEngine, path: str, fields: Mapping[str, Any], gate: Callable[[Sequence[int] | None], None]
) -> None:
    """Have the engine's app prepare a request: `gate` gets each prompt, and raises, so that nothing is computed.

    What the app does not take comes to no prompt.
    """
    body = _encode(fields)
    call = CancellableCall(_receiving(body), RecordedAnswer(0).send, engine.failing)
    token = watching.set(Watch(background=True, gate=gate))
    try:
        with engine.alarm(call.cut):
            await call.run(engine.backend.app, _scope(path, body))
    finally:
        watching.reset(token)


def _receiving(body: bytes) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        return await asyncio.Future()  # a client that never leaves; it ends with its task

    return receive


def _scope(path: str, body: bytes) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": ("loradock", 80),
        "state": {},
    }
