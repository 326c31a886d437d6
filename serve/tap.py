"""Watches an answer go by, times it, and offers an Exchange; never waits, never raises."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Message, Send


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as it went by. Times are seconds; `first` is None when no byte of an answer was sent."""

    adapter: str
    version: str
    status: int
    first: float | None
    total: float


class Tap:
    """Stands in a response's way: `send` passes everything on as it came."""

    __slots__ = ("_first", "_send", "_started", "adapter", "events", "status", "version")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = time.perf_counter()
        self._first: float | None = None
        self.adapter = "other"
        self.version = ""
        # The answer is a stream of server-sent events.
        self.events = False
        # What is logged when the client left before anything was answered.
        self.status = 499

    @property
    def begun(self) -> bool:
        """The client has been sent a status."""
        return self.status != 499

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.events = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"]
            )
        elif self._first is None:
            self._first = time.perf_counter()
        await self._send(message)

    def offer(self, take: Callable[[Exchange], None]) -> None:
        """Hand what was seen to `take`."""
        first = None if self._first is None else self._first - self._started
        take(Exchange(self.adapter, self.version, self.status, first, time.perf_counter() - self._started))
