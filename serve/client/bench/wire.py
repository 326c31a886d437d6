"""One HTTP/1.1 connection that times what arrives.

A general HTTP client costs more CPU per streamed token than a small model's server does, and on a machine that
both share the client would be measured too. So this one knows POST and GET, chunked bodies and nothing else.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from time import perf_counter
from typing import cast
from urllib.parse import urlsplit

Feed = Callable[[bytes, float], None]


class WireError(Exception):
    """The conversation broke off; `kind` is the word under which it is counted."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Address:
    """Where a server listens, and the fixed part of every request to it."""

    def __init__(self, url: str, key: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an address of the form http://HOST:PORT")
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.secure = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if self.secure else 80)
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"
        self._path = path
        self._tls = ssl.create_default_context() if self.secure else None
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", "User-Agent: loradock-bench", "Accept-Encoding: identity"]
        if key:
            lines.append(f"Authorization: Bearer {key}")
        self._headers = "".join(f"{line}\r\n" for line in lines)

    def get(self, path: str) -> bytes:
        return f"GET {self._path}{path} HTTP/1.1\r\n{self._headers}\r\n".encode()

    def post(self, path: str, body: bytes) -> bytes:
        head = f"POST {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def connect(self) -> Connection:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, self.host, self.port, ssl=self._tls
            )
        except OSError as refused:
            raise WireError("connect", f"cannot connect to {self.url}: {refused.strerror or refused}") from refused
        return connection


class Reply:
    """The status, the headers, and the body where nobody asked to be fed."""

    __slots__ = ("body", "headers", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()


class Connection(asyncio.Protocol):
    """Sends one request at a time; feeds a 200's body to the asker as it arrives, stamped with its arrival."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Reply] | None = None
        self._feed: Feed | None = None
        self._start()

    async def exchange(self, request: bytes, feed: Feed | None = None) -> Reply:
        if self._transport is None or self._transport.is_closing():
            raise WireError("dropped", "the server closed the connection")
        self._start()
        self._feed = feed
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._done
        finally:
            self._done = None

    @property
    def reusable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing() and self._ended and self._keep

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        try:
            body = self._parse(data)
            if body:
                if self._feed is not None and self._reply.status == 200:
                    self._feed(body, now)
                else:
                    self._reply.body += body
        except WireError as broken:
            self._fail(broken)
        except ValueError as broken:
            self._fail(WireError("malformed", f"the answer is not HTTP/1.1: {broken}"))
        else:
            if self._ended and self._done is not None and not self._done.done():
                self._done.set_result(self._reply)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if self._in_body and self._until_close and exc is None:
            self._ended = True
            self._done.set_result(self._reply)
        elif self._in_body:
            self._fail(WireError("truncated", "the connection dropped in the middle of the answer"))
        else:
            self._fail(WireError("dropped", "the server closed the connection without an answer"))

    # -- parsing

    def _start(self) -> None:
        self._reply = Reply()
        self._buffer = b""
        self._in_body = self._ended = self._chunked = self._until_close = False
        self._keep = True
        self._left = 0  # bytes still to come of this chunk (its CRLF included) or of this body

    def _parse(self, data: bytes) -> bytes:
        """The bytes of the body in `data`."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        while not self._in_body:
            head, mark, rest = data.partition(b"\r\n\r\n")
            if not mark:
                self._buffer = data
                return b""
            self._read_head(head)
            data = rest
        return self._read_chunks(data) if self._chunked else self._read_plain(data)

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1"):
            raise ValueError(f"it begins with {first[:40]!r}")
        self._reply.status = int(status[:3])
        if self._reply.status < 200:
            return
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._reply.headers = headers
        self._in_body = True
        self._keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        if "chunked" in headers.get("transfer-encoding", "").lower():
            self._chunked = True
        elif "content-length" in headers:
            self._left = int(headers["content-length"])
            self._ended = self._left == 0
        elif self._reply.status in (204, 304):
            self._ended = True
        else:
            self._until_close, self._keep = True, False

    def _read_plain(self, data: bytes) -> bytes:
        if self._until_close:
            return data
        data = data[: self._left]
        self._left -= len(data)
        self._ended = self._left == 0
        return data

    def _read_chunks(self, data: bytes) -> bytes:
        parts: list[bytes] = []
        at, size = 0, len(data)
        while at < size and not self._ended:
            if self._left:
                taken = data[at : at + self._left]
                at += len(taken)
                payload = len(taken) - max(0, 2 - (self._left - len(taken)))  # less what arrived of the closing CRLF
                self._left -= len(taken)
                parts.append(taken[: max(0, payload)])
                continue
            end = data.find(b"\r\n", at)
            if end < 0:
                self._buffer = data[at:]
                break
            length = int(data[at:end].partition(b";")[0], 16)
            if length:
                at = end + 2
                self._left = length + 2
            elif data.find(b"\r\n\r\n", end) >= 0:  # the last chunk, its trailers (none, as a rule) and the empty line
                self._ended = True
            else:
                self._buffer = data[at:]
                break
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fail(self, error: WireError) -> None:
        self._keep = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)
        self.close()
