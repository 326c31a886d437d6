"""For Ray Serve's proxies: a request says in a header which adapter it is for, so that they can route by it.

A proxy sees headers alone. This middleware reads the body's `model`, and hands the body on as it came. A body that is
long, or does not come in time, goes on unread: whoever answers judges it, and finds its home then.

`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middleware`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable

import msgspec
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.gateway.auto import AUTO
from serve.gateway.request import PATHS, TEXT_BYTES
from serve.names import DEFAULT

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = "serve.server.ray_proxy:middleware"
HEADER = b"serve_multiplexed_model_id"
WAIT_SECONDS = 2.0
# NAME or TENANT/NAME, before the version if one is named.
_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,63}(?=@|\Z)")


class _Body(msgspec.Struct):
    model: str = ""


_decode = msgspec.json.Decoder(_Body).decode


def middleware() -> list[Middleware]:
    """What Ray puts before its proxy's app."""
    return [Middleware(ModelHeader)]


class ModelHeader:
    """Only this middleware says which adapter a request is for: a client's own header is dropped."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Ray takes hyphens for underscores.
        headers = [header for header in scope["headers"] if header[0].lower().replace(b"-", b"_") != HEADER]
        body = _BodyAhead(receive)
        try:
            if scope["method"] == "POST" and PATHS.fullmatch(scope["path"]):
                name = model_of(await body.read())
                headers += [(HEADER, name.encode())] if name else []
            await self._app({**scope, "headers": headers}, body.receive, send)
        finally:
            body.close()


def model_of(body: bytes) -> str:
    """The adapter that a request names, without its version; "" for none."""
    try:
        model = _decode(body).model
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    named = _NAME.match(model) if model != AUTO else None  # which one, the server knows that is asked
    return named[0].removeprefix(f"{DEFAULT}/") if named else ""


class _BodyAhead:
    """A request's messages, of which some are read before their time. `receive` gives all of them, in their order."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read: list[Message] = []
        # One that is waited for longer than `read` does.
        self._next: asyncio.Future[Message] | None = None

    async def read(self) -> bytes:
        """The whole body; nothing, if it is too long, too slow, or broken off."""
        size = 0
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while True:
                    message = await asyncio.shield(self._coming())
                    self._next = None
                    self._read.append(message)
                    size += len(message.get("body", b""))
                    if message["type"] != "http.request" or size > TEXT_BYTES:
                        return b""
                    if not message.get("more_body", False):
                        return b"".join(message.get("body", b"") for message in self._read)
        except TimeoutError:
            return b""

    async def receive(self) -> Message:
        if self._read:
            return self._read.pop(0)
        if self._next is None:
            return await self._receive()
        message = await self._next
        self._next = None
        return message

    def close(self) -> None:
        """Nobody reads any more."""
        if self._next is not None:
            self._next.cancel()

    def _coming(self) -> Awaitable[Message]:
        self._next = self._next or asyncio.ensure_future(self._receive())
        return self._next
