"""What any thread puts in, one task of an event loop takes out, in order."""

from __future__ import annotations

import asyncio
import queue
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    def __init__(self) -> None:
        self._items: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._arrived = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def put(self, item: T) -> None:
        """Never waits; what nobody takes stays."""
        self._items.put(item)
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody takes any more
                self._loop.call_soon_threadsafe(self._arrived.set)

    async def take(self) -> T:
        self._loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            try:
                return self._items.get_nowait()
            except queue.Empty:
                await self._arrived.wait()
