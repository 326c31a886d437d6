"""A neighbour made slow, refusing, or cut in half: a proxy before a service on this machine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Literal

Mode = Literal["pass", "slow", "refusing", "halves", "frozen"]
Upstream = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]

SLOW_SECONDS = 5.0


class Proxy:
    """Listens on a port of 127.0.0.1 in a thread of its own; `mode` holds from the next bytes on.

    slow        every answer comes `SLOW_SECONDS` late
    refusing    no connection is taken, and those that stand are cut
    frozen      nothing passes, and no connection ends
    halves      of every answer half of the bytes come, then the connection is cut
    """

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._mode: Mode = "pass"
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def become(self, mode: Mode) -> None:
        self._call(self._become(mode))

    def _call(self, job: Awaitable[None]) -> None:
        async def run() -> None:
            await job

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _become(self, mode: Mode) -> None:
        self._mode = mode
        if mode == "refusing":
            await self._close()
        elif self._server is None:
            await self._listen()

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _end(self) -> None:
        await self._close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, asks = await self._upstream()
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, asks}
        try:
            await asyncio.gather(self._pump(reader, asks, False), self._pump(answers, writer, True))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in (writer, asks):
                self._writers.discard(each)
                each.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
        while data := await source.read(1 << 16):
            while self._mode == "frozen":
                await asyncio.sleep(0.02)
            if answers and self._mode == "slow":
                await asyncio.sleep(SLOW_SECONDS)
            if answers and self._mode == "halves":
                sink.write(data[: len(data) // 2])
                await sink.drain()
                raise ConnectionAbortedError
            sink.write(data)
            await sink.drain()
        sink.write_eof()


def tcp(port: int) -> Upstream:
    return lambda: asyncio.open_connection("127.0.0.1", port)


def unix(path: str) -> Upstream:
    return lambda: asyncio.open_unix_connection(path)
