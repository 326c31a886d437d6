"""A request that came to a server which is no home of its adapter is sent on once, to one that is.

It goes as it came: path, body and the client's own key, so that the home judges it as any other, and charges it. The
answer streams back as it is. A home that cannot be reached, has no room or does not serve now answers nothing: the
request is answered here then. The mark says that a request is not to be sent on again, and nothing else; a client that
sets it is answered where it asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager, suppress

import httpx
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import Message, Receive, Scope, Send

from serve.adapters.adapter import Adapter
from serve.asgi.answer_headers import REQUEST_ID
from serve.errors import EngineUnavailable
from serve.fleet.membership import Membership, Peer

MARK = b"x-loradock-forwarded"
CONNECT_SECONDS = 1.0
# What a home says when it does not take a request; longer answers are a client's to read.
REFUSAL_BYTES = 64 << 10
# They belong to one connection, and not to the request (RFC 9110, 7.6.1).
_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)
# This server has its own.
_ANSWERED = _HOP | {b"date", b"server"}
_OWN = _HOP | {b"host", b"content-length", b"expect", MARK, REQUEST_ID}


class Forwarding(Collector):
    """Sends requests on to homes, and counts them."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._client: httpx.AsyncClient | None = None
        self._counts = {"home": 0, "here": 0}

    def peer(self, scope: Scope, adapter: Adapter) -> Peer | None:
        """Who is to answer a request for this adapter; None: this server."""
        if is_sent_on(scope):
            return None
        return self._membership.route(adapter.name, adapter.rank)

    def call(self, peer: Peer, body: bytes, request_id: str) -> ForwardedCall:
        """The request, on its way to `peer`."""
        return ForwardedCall(self._http(), self._membership.me, peer, body, request_id)

    def ended(self, call: ForwardedCall) -> None:
        """Count it; a peer that did not take it is left alone for a while, unless it is only full."""
        self._counts["home" if call.taken else "here"] += 1
        if call.taken:
            self._membership.answered(call.peer)
        elif not call.full:
            self._membership.failed(call.peer)

    def _http(self) -> httpx.AsyncClient:
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=256, keepalive_expiry=20)
            self._client = httpx.AsyncClient(limits=limits, trust_env=False)
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "loradock_forwarded_requests",
            "Requests sent on to a home of their adapter, by who answered: it (home), or this server after all (here).",
            labels=("answered",),
        )
        for answered, count in self._counts.items():
            family.add_metric((answered,), count)
        yield family


class ForwardedCall:
    """One request at another server, as an ASGI app. `taken`: that one answers it, and its answer has begun.

    Until then nothing was sent to the client. `full`: it said that it has no room.
    """

    def __init__(self, client: httpx.AsyncClient, me: str, peer: Peer, body: bytes, request_id: str) -> None:
        self.peer = peer
        self.taken = self.full = False
        self._client = client
        self._me = me
        self._body = body
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ends with the answer, when the client leaves, and when the other server is gone."""
        self.peer.begin()
        answering = asyncio.ensure_future(self._answer(scope, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            with self._alarmed(answering):
                await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # It closes the connection, which the other server takes for a client that has left.
            for task in (answering, leaving):
                task.cancel()
            await asyncio.wait({answering, leaving})
        if leaving.done() and not leaving.cancelled() and (answering.cancelled() or not answering.done()):
            self.taken = True  # nobody is there to be answered again
            return
        if answering.cancelled():
            if self.taken:
                raise EngineUnavailable("the server that answered is gone; retry")
            return
        answering.result()

    @contextmanager
    def _alarmed(self, answering: asyncio.Future[None]) -> Iterator[None]:
        alarm = answering.cancel
        self.peer.alarms.add(alarm)
        try:
            yield
        finally:
            self.peer.alarms.discard(alarm)

    async def _answer(self, scope: Scope, send: Send) -> None:
        try:
            response = await self._client.send(
                _sent_on(scope, self._me, self.peer, self._body, self._request_id), stream=True
            )
        except (httpx.HTTPError, httpx.InvalidURL, OSError):
            return
        try:
            if response.status_code in (429, 503) and await self._refused(response, send):
                return
            if not self.taken:
                await self._pass(response, response.aiter_raw(), send)
        except httpx.HTTPError as error:
            if self.taken:
                raise EngineUnavailable("the server that answered broke off; retry") from error
        finally:
            await response.aclose()

    async def _refused(self, response: httpx.Response, send: Send) -> bool:
        """Whether the other server does not take the request; else its answer has been sent."""
        chunks: list[bytes] = []
        stream = response.aiter_raw()
        async for chunk in stream:
            chunks.append(chunk)
            if sum(map(len, chunks)) > REFUSAL_BYTES:
                break
        self.full = response.status_code == 429
        if response.status_code == 503 or _code(b"".join(chunks)) == "overloaded":
            return True
        await self._pass(response, _after(chunks, stream), send)
        return False

    async def _pass(self, response: httpx.Response, stream: AsyncIterator[bytes], send: Send) -> None:
        headers = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in _ANSWERED]
        start: Message = {"type": "http.response.start", "status": response.status_code, "headers": headers}
        self.taken = True
        await send(start)
        async for chunk in stream:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _sent_on(scope: Scope, me: str, peer: Peer, body: bytes, request_id: str) -> httpx.Request:
    """The same request to another server, which answers for as long as it takes."""
    headers = [(name, value) for name, value in scope["headers"] if name not in _OWN]
    headers += [(MARK, me.encode()), *([(REQUEST_ID, request_id.encode())] if request_id else [])]
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    target = (path.partition(b"?")[0] + (b"?" + query if query else b"")).decode("latin-1")
    # Not by `build_request`, which adds headers of its own: an answer would be compressed that nobody wants so.
    return httpx.Request(
        scope["method"],
        peer.address.rstrip("/") + target,
        headers=headers,
        content=body,
        extensions={"timeout": {"connect": CONNECT_SECONDS, "pool": None, "read": None, "write": None}},
    )


def is_sent_on(scope: Scope) -> bool:
    """Whether another server has sent the request on to this one."""
    return any(name == MARK for name, _ in scope["headers"])


async def _left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def _after(chunks: Iterable[bytes], stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    async for chunk in stream:
        yield chunk


def _code(body: bytes) -> object:
    """The code of an error in OpenAI's shape; None for anything else."""
    with suppress(ValueError, AttributeError, TypeError):
        return json.loads(body)["error"].get("code")
    return None
