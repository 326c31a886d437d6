"""Further processes that write long streams into their clients' sockets, so that more than one core sends tokens.

Most of what a token costs a server is the write into its client's socket. Everything else stays in the server: what is
read from clients, who is let in, leases, counts, cancellation, and the text of each piece. Once a stream has shown to
be a long one, a process gets a copy of its connection's descriptor and writes what the server tells it to, in order.
The server has the connection back when the answer has ended, or when its client reads too slowly.

A process that dies takes nothing along but where its streams stood: they end with an error, and a new process takes its
place.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.errors import EngineUnavailable, LoradockError
from serve.models import hardware
from serve.server.front_end_process import FORGET, GIVE_BACK, OPEN, STUCK, Messages, framed, packed

log = logging.getLogger(__name__)

PROGRAM = Path(__file__).with_name("front_end_process.py")
# What may wait for a process, in bytes, and for how many seconds it may not answer, before it is taken for one that
# hangs. It is asked so many times meanwhile: a server that stood still itself finds the answer behind the first time.
MOST_WAITING = 64 << 20
HANG_SECONDS, LOOKS = 10.0, 4
# No stream has this number: to give it back is to answer.
NOBODY = 0
# Seconds before a process that died is begun anew: the first time, and where it dies again and again.
PAUSE, LONGEST_PAUSE = 0.1, 60.0
START_SECONDS, END_SECONDS = 60.0, 5.0
DIED = "the process that sent this answer has died; send the request again"

Cut = Callable[[LoradockError], None]


def how_many(front_ends: str, *, secure: bool) -> int:
    """Processes that send tokens, the server among them. A CPU's cores compute, and TLS cannot be handed over."""
    if front_ends != "auto":
        return int(front_ends)
    spare = len(os.sched_getaffinity(0)) >= 4 and not hardware.on_cpu()
    return 2 if spare and not secure else 1


class Place(Enum):
    """Who writes to a connection."""

    THERE = "the other process"
    RETURNING = "nobody, until the other process has said what it could not write"
    HERE = "the server"


class HandedConnection:
    """A connection's transport whose writes another process does, until it has the connection given back. Everything
    else is done here. `cut` ends the call that is answered, if the process dies."""

    def __init__(self, transport: Any, process: FrontEnd, number: int, cut: Cut) -> None:
        self.transport = transport
        self._process = process
        self._number = number
        self._cut: Cut | None = cut
        self._place = Place.THERE
        # The process writes, and its client reads as fast. Looked at for each token.
        self.is_there = True
        # What the process does with a text.
        self._form = b"", b""
        self._waiting: list[bytes] = []
        self._closing = False

    @property
    def is_here(self) -> bool:
        return self._place is Place.HERE

    def form(self, head: bytes, tail: bytes) -> None:
        """What stands before and behind each text that is to be said."""
        self._form = head, tail
        if self.is_there:
            self._process.put(self._number, self._form)

    def say(self, text: str) -> None:
        """Write a text in its chunk."""
        if self.is_there:
            self._process.put(self._number, text)
        else:
            head, tail = self._form
            self.write(framed(head, text, tail))

    def write(self, data: bytes) -> None:
        if self.is_there:
            self._process.put(self._number, data)
        elif self._place is Place.RETURNING:
            self._waiting.append(data)
        else:
            self.transport.write(data)

    def give_back(self) -> None:
        """Have the connection back. What is written meanwhile waits."""
        if self.is_there:
            self._move(Place.RETURNING)
            self._process.put(self._number, GIVE_BACK)

    def answered(self) -> None:
        """The answer is whole."""
        self._cut = None
        self.give_back()

    def returned(self, rest: bytes) -> None:
        self._move(Place.HERE)
        data = b"".join((rest, *self._waiting))
        self._waiting.clear()
        if data:
            self.transport.write(data)
        if self._closing:
            self.transport.close()

    def lost(self) -> None:
        """The process has died: nobody knows what of the last pieces was written."""
        self._move(Place.HERE)
        self._waiting.clear()
        cut, self._cut = self._cut, None
        if cut is None or self._closing:
            self.transport.abort()
        else:
            cut(EngineUnavailable(DIED))

    def leave(self) -> None:
        """The client is gone."""
        self._cut = None
        if not self.is_here:
            self._move(Place.HERE)
            self._waiting.clear()
            self._process.forget(self._number)

    def _move(self, place: Place) -> None:
        self._place = place
        self.is_there = place is Place.THERE

    def close(self) -> None:
        self._closing = True
        self.give_back()
        if self.is_here:
            self.transport.close()

    def abort(self) -> None:
        self.leave()
        self.transport.abort()

    def is_closing(self) -> bool:
        return self._closing or bool(self.transport.is_closing())

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.transport.get_extra_info(name, default)


class FrontEnd(asyncio.Protocol):
    """One process, and the streams that it writes."""

    def __init__(self, process: subprocess.Popen[bytes], descriptors: socket.socket) -> None:
        self.process = process
        self.streams: dict[int, HandedConnection] = {}
        self.ready, self.ended = asyncio.Event(), asyncio.Event()
        # How many it took along when it died.
        self.lost = 0
        self._descriptors = descriptors
        self._loop = asyncio.get_running_loop()
        self._messages = Messages()
        self._pairs: list[Any] = []
        self._count = NOBODY
        # Looks since the process last answered.
        self._looks = 0
        self._transport: Any = None

    @classmethod
    async def started(cls) -> FrontEnd:
        """A new process."""
        ours, its = socket.socketpair()
        descriptors, its_descriptors = socket.socketpair()
        for each in (ours, descriptors):
            each.setblocking(False)
        with its, its_descriptors:
            files = its.fileno(), its_descriptors.fileno()
            process = await asyncio.to_thread(
                subprocess.Popen,
                [sys.executable, "-P", str(PROGRAM), *map(str, files)],
                stdin=subprocess.DEVNULL,
                pass_fds=files,
                start_new_session=True,
                env={**os.environ, "LD_PRELOAD": ""},  # those are for the engine's threads
            )
        front_end = cls(process, descriptors)
        await asyncio.get_running_loop().create_unix_connection(lambda: front_end, sock=ours)
        return front_end

    async def end(self) -> None:
        """Once it has written what waits for it."""
        self._transport.close()
        try:
            await asyncio.to_thread(self.process.wait, END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    def take(self, transport: Any, cut: Cut) -> HandedConnection | None:
        """The connection, from now on written to by this process; None if that cannot be."""
        sock = transport.get_extra_info("socket")
        if sock is None or transport.get_extra_info("sslcontext") is not None or transport.get_write_buffer_size():
            return None  # what waits here has to go first
        try:
            socket.send_fds(self._descriptors, [b"."], [sock.fileno()])
        except OSError:  # there are too many on the way
            return None
        self._count += 1
        handed = self.streams[self._count] = HandedConnection(transport, self, self._count, cut)
        self.put(self._count, OPEN)
        return handed

    def put(self, number: int, what: str | bytes | int | tuple[bytes, bytes]) -> None:
        if not self._pairs:
            self._loop.call_soon(self._flush)
        self._pairs += (number, what)

    def forget(self, number: int) -> None:
        del self.streams[number]
        self.put(number, FORGET)

    def _flush(self) -> None:
        pairs, self._pairs = self._pairs, []
        if self.ended.is_set():
            return
        if self._transport.get_write_buffer_size() > MOST_WAITING:
            self.process.kill()
        self._transport.write(packed(pairs))

    def look(self) -> None:
        """End a process that has not answered for too long; ask it again, if it has."""
        if self._looks > LOOKS:
            self.process.kill()
        elif not self._looks:
            self.put(NOBODY, GIVE_BACK)
        self._looks += 1

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for pairs in self._messages.take(data):
            each = iter(pairs)
            for number, what in zip(each, each, strict=True):
                self._answered(number, what)

    def _answered(self, number: int, what: bytes | int) -> None:
        if number == NOBODY:
            self._looks = 0
            self.ready.set()
        if number not in self.streams:  # its client has left
            return
        if what == STUCK:
            self.streams[number].give_back()
        elif isinstance(what, bytes):
            self.streams.pop(number).returned(what)

    def connection_lost(self, exc: Exception | None) -> None:
        self.ready.set()
        self.ended.set()
        self._descriptors.close()
        streams, self.streams = self.streams, {}
        self.lost = len(streams)
        for handed in streams.values():
            handed.lost()


class FrontEnds(Collector):
    """The processes of one server, `count` beside its own."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._running: list[FrontEnd] = []
        # Since the start.
        self.deaths = self.handed = 0

    @property
    def pids(self) -> list[int]:
        return [front_end.process.pid for front_end in self._running]

    def take(self, transport: Any, cut: Cut) -> HandedConnection | None:
        """The connection, handed to the process with the fewest streams; None if there is none, or it cannot be."""
        front_end = min(self._running, key=lambda each: len(each.streams), default=None)
        handed = front_end.take(transport, cut) if front_end else None
        self.handed += handed is not None
        return handed

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Within the block there are as many as there should be; one that dies has a follower."""
        keepers = [asyncio.create_task(self._keep()) for _ in range(self._count)]
        try:
            yield
        finally:
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)

    async def _keep(self) -> None:
        pause = PAUSE
        while True:
            began = asyncio.get_running_loop().time()
            try:
                await self._run_one()
            except OSError as error:
                log.warning("no further process for sending tokens can be started: %s", error)
            lived = asyncio.get_running_loop().time() - began
            pause = PAUSE if lived > LONGEST_PAUSE else min(2 * pause, LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _run_one(self) -> None:
        """To its death."""
        front_end = await FrontEnd.started()
        try:
            front_end.look()
            async with asyncio.timeout(START_SECONDS):
                await front_end.ready.wait()
            self._running.append(front_end)
            while not front_end.ended.is_set():
                front_end.look()
                with suppress(TimeoutError):
                    async with asyncio.timeout(HANG_SECONDS / LOOKS):
                        await front_end.ended.wait()
        finally:
            if front_end in self._running:
                self._running.remove(front_end)
            await front_end.end()
        self.deaths += 1
        code, lost = front_end.process.returncode, front_end.lost
        log.warning("a process that sends tokens died (exit code %s), and %d streams with it", code, lost)

    def collect(self) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            "loradock_front_ends",
            "Processes that send tokens to clients, the server's own among them (setting front_ends).",
        )
        running.add_metric((), 1 + len(self._running))
        deaths = CounterMetricFamily(
            "loradock_front_end_deaths",
            "Processes beside the server's own that sent tokens and died; their streams ended with an error.",
        )
        deaths.add_metric((), self.deaths)
        handed = CounterMetricFamily(
            "loradock_handed_streams",
            "Long streams whose tokens another process than the server's own began to send.",
        )
        handed.add_metric((), self.handed)
        yield from (running, deaths, handed)
