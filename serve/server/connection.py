"""HTTP connections that cannot be held for nothing: bounded heads, a deadline for each phase, room for newcomers.

uvicorn waits for ever for the rest of a request. Here every phase has an end:

    head      `client_timeout` from its first byte (for the first request: from the connection) to its last
    body      at least `BODY_RATE` bytes a second in the mean over each `client_timeout`
    answer    what the client does not read for longer than `client_timeout` is given up
    between   `KEEP_ALIVE`

A head above `HEAD_BYTES` is a 431, a URL above `URL_BYTES` a 414. When connections that showed no key yet fill their
share, the oldest of them is closed for the newcomer, so that nobody without a key can keep others out.

A request whose client has closed the connection by the time its head is read is not begun. When more come than can be
begun, those that wait longest are the first to be given up, and each of them costs its parsing alone.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import select
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serve.asgi.connection import BODY, CONNECTION
from serve.asgi.fast_stream import FLOW
from serve.server.front_ends import Cut, FrontEnds, HandedConnection

log = logging.getLogger(__name__)

# Longer than any client's or load balancer's own (httpx 5 s, nginx and ALB 60, Go's and Traefik's 90): who closes an
# idle connection first must be the side that sends, or a request meets its end.
KEEP_ALIVE = 120
HEAD_BYTES = 64 << 10
URL_BYTES = 16 << 10
BODY_RATE = 256
# Descriptors for everything that is not a client: files, the database, the engine, the object store.
RESERVED = 256
# Connections from this machine that are taken beyond the limit, so that an operator gets in.
OPERATORS = 32
# The app's own deadlines come first, since it can answer in its own words.
SLACK = 1.1
# What says that the other side of a socket was closed. The first is Linux's.
_CLOSED = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections there may be at once: in all, without a key, and without a key from one address."""

    total: int
    anonymous: int
    per_address: int

    @classmethod
    def of_descriptors(cls, descriptors: int) -> ConnectionLimits:
        """A share of this process's file descriptors."""
        total = max(64, descriptors - RESERVED)
        return cls(total, max(48, total // 2), max(32, total // 4))


def raise_descriptor_limit(most: int = 65_536) -> int:
    """Take as many file descriptors as this process may have, up to `most`; the number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return most if soft == resource.RLIM_INFINITY else soft


class Connections:
    """The open connections of one server, oldest first, and which of them showed no key yet."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._all: set[GuardedProtocol] = set()
        self._anonymous: dict[GuardedProtocol, str] = {}
        self._by_address: Counter[str] = Counter()
        self.closed_for_room = 0

    def __len__(self) -> int:
        return len(self._all)

    def add(self, connection: GuardedProtocol, address: str) -> bool:
        """Take it, if there is room for it or room can be made."""
        spare = OPERATORS if _is_local(address) else 0
        if len(self._all) >= self.limits.total + spare:
            self._close_oldest()
            if len(self._all) >= self.limits.total + spare:
                return False
        if len(self._anonymous) >= self.limits.anonymous:
            self._close_oldest()
        elif self._by_address[address] >= self.limits.per_address:
            self._close_oldest(address)
        self._all.add(connection)
        self._anonymous[connection] = address
        self._by_address[address] += 1
        return True

    def recognise(self, connection: GuardedProtocol) -> None:
        address = self._anonymous.pop(connection, None)
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    def discard(self, connection: GuardedProtocol) -> None:
        self.recognise(connection)
        self._all.discard(connection)

    def _close_oldest(self, address: str | None = None) -> None:
        """Close a connection without a key, preferably one that is not answered right now."""
        oldest = None
        for connection, its in self._anonymous.items():
            if address in (None, its):
                oldest = oldest or connection
                if not connection.is_answered:
                    oldest = connection
                    break
        if oldest is not None:
            self.closed_for_room += 1
            self.discard(oldest)
            oldest.transport.abort()


class ChunkedBody:
    """The body of an answer whose length is not known ahead, as uvicorn writes it."""

    __slots__ = ("_connection", "_cycle", "_write")

    def __init__(self, cycle: RequestResponseCycle, connection: GuardedProtocol) -> None:
        self._cycle = cycle
        self._connection = connection
        self._write: Callable[[bytes], None] = cycle.transport.write

    @property
    def is_open(self) -> bool:
        cycle = self._cycle
        begun = cycle.response_started and not cycle.response_complete
        return bool(begun and cycle.chunked_encoding and not cycle.disconnected)

    def write(self, piece: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(piece), piece))

    def hand_over(self, cut: Cut) -> HandedConnection | None:
        handed = self._connection.hand_over(cut) if self.is_open else None
        if handed is not None:
            self._write = handed.write
        return handed


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP with a deadline for each phase; see the module. Made by `guarded`."""

    seconds: float
    peers: Connections
    front_ends: FrontEnds | None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._in_head = self._in_body = self._refused = False
        self._head_bytes = self._body_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._handed: HandedConnection | None = None
        if not self.peers.add(self, self.client[0] if self.client else ""):
            self._refuse(503, "this server has no room for another connection: try again shortly")
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self.peers.discard(self)
        for timer in (self._head_timer, self._body_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        if self._handed is not None:
            self._handed.leave()
        super().connection_lost(exc)

    @property
    def is_answered(self) -> bool:
        """A request is with the app."""
        return self.cycle is not None and not self.cycle.response_complete

    def recognise(self) -> None:
        self.peers.recognise(self)

    @property
    def has_left(self) -> bool:
        """The socket is asked: in a busy event loop the news of its end lies behind everything that came before."""
        sock = self.transport.get_extra_info("socket")
        if self.transport.is_closing() or sock is None or sock.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(sock.fileno(), _CLOSED)
        return bool(poll.poll(0))

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse(431, f"the request's headers are above {HEAD_BYTES >> 10} KiB")
                return
        super().data_received(data)
        if not (self._in_head or self._in_body or self._refused or self.is_answered):
            self._expect_head()  # bytes that began no request

    def on_message_begin(self) -> None:
        if self._handed is not None and self._handed.is_here:
            self.transport, self._handed = self._handed.transport, None
        super().on_message_begin()
        extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
        extensions |= {FLOW: self.flow, CONNECTION: self}
        self._in_head, self._head_bytes = True, 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        if len(self.url) + len(url) > URL_BYTES:
            self._refuse(414, f"the URL is above {URL_BYTES >> 10} KiB")
            return
        super().on_url(url)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_expecting()
        if not self._refused and sum(len(name) + len(value) + 4 for name, value in self.headers) > HEAD_BYTES:
            self._refuse(431, f"the request's headers are above {HEAD_BYTES >> 10} KiB")
        if not self._refused and self.has_left:
            self._refused = True
            self.transport.abort()
        if self._refused:
            return
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
            extensions[BODY] = ChunkedBody(self.cycle, self)
        self._in_body, self._body_bytes = True, 0
        if self._body_timer is None:
            self._body_timer = self.loop.call_later(self.seconds * SLACK, self._check_body)

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            self._body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None
        if not self._refused:
            super().on_message_complete()

    def hand_over(self, cut: Cut) -> HandedConnection | None:
        """Have another process write what this connection's answer has still to say; None if none does."""
        if self.front_ends is None or self.pipeline or (self._handed is not None and not self._handed.is_here):
            return None
        transport = self._handed.transport if self._handed is not None else self.transport
        handed = self.front_ends.take(transport, cut)
        if handed is not None:
            writes: Any = handed
            self._handed = self.transport = self.cycle.transport = writes
        return handed

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._handed is not None:
            self._handed.answered()

    def handle_websocket_upgrade(self) -> None:
        self._stop_expecting()
        self.peers.discard(self)
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.seconds * SLACK, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.seconds, self._head_is_late)

    def _stop_expecting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.is_answered:
            self._expect_head()  # half a next request behind one that is being answered: that one ends first
        elif self._in_head:
            self._refuse(408, f"the request's headers were not whole after {self.seconds:g} s")
        else:
            self.transport.close()

    def _check_body(self) -> None:
        self._body_timer = None
        if not self._in_body or self._refused:
            return
        # What the app does not read yet is not the client's fault.
        waits = self.flow.read_paused or self.cycle.waiting_for_100_continue
        slow = self._body_bytes < BODY_RATE * self.seconds and not waits
        self._body_bytes = 0
        if slow and not self.cycle.response_complete:
            self._refuse(408, f"less than {BODY_RATE} bytes of the body came in a second, over {self.seconds:g} s")
        elif slow:
            self.transport.close()
        else:
            self._body_timer = self.loop.call_later(self.seconds * SLACK, self._check_body)

    def _refuse(self, status: int, message: str) -> None:
        """Answer in OpenAI's shape, if nothing of an answer has gone out yet, and close."""
        self._refused = True
        self._stop_expecting()
        if not self.pipeline and not (self.is_answered and self.cycle.response_started):
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(head.encode() + body)
        self.transport.close()


def guarded(
    client_timeout: float, limits: ConnectionLimits | None = None, front_ends: FrontEnds | None = None
) -> type[GuardedProtocol]:
    """The protocol of one server, whose connections know of one another. `front_ends` write its long streams."""
    peers = Connections(limits or ConnectionLimits.of_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    return type("Guarded", (GuardedProtocol,), {"seconds": client_timeout, "peers": peers, "front_ends": front_ends})


@lru_cache(1024)
def _is_local(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False
