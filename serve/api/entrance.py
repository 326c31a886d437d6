"""Before a route reads a body: who sends it, and how long may it be.

FastAPI reads a body whole before any dependency runs. So the key is looked at here, first: without a known one the
route sees no body and answers as it does to anybody without a key. With one, up to `BODY_BYTES` are taken, but for the
routes that count what they read themselves.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.asgi.connection import recognise
from serve.asgi.origin import READS
from serve.auth.auth import Auth
from serve.errors import LoradockError, TooLarge

BODY_BYTES = 1 << 20
# They read their body piece by piece, up to a limit of their own: an upload, a batch's file, a baseline's file, and
# what a worker brings.
COUNT_THEMSELVES = re.compile(
    r"POST /v1/adapters|POST /v1/files|PUT /v1/adapters/.+/baseline|PUT /v1/fine_tuning/work/.+/files/.+"
)


class Entrance:
    """`fresh` returns once this server sees the keys that others issued or revoked before."""

    def __init__(self, app: ASGIApp, auth: Auth, fresh: Callable[[], Awaitable[None]] | None = None) -> None:
        self._app = app
        self._auth = auth
        self._fresh = fresh

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in READS:
            await self._app(scope, receive, send)
            return
        try:
            if self._fresh:
                await self._fresh()
            self._auth.known(Headers(scope=scope))
        except LoradockError:
            await self._app(scope, _replayed(b"", receive), send)  # the route refuses in its own words, and is audited
            return
        recognise(scope)
        if COUNT_THEMSELVES.fullmatch(f"{scope['method']} {scope['path']}"):
            await self._app(scope, receive, send)
            return
        try:
            body = await _read(scope, receive)
        except TooLarge as error:
            await JSONResponse(error.body(), status_code=error.status)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), send)


async def _read(scope: Scope, receive: Receive) -> bytes | None:
    """The whole body; None if the client left before it was whole."""
    too_large = TooLarge(f"the request body is above {BODY_BYTES >> 10} KiB, the most that {scope['path'][:200]} takes")
    stated = Headers(scope=scope).get("content-length", "0")
    if stated.isdecimal() and int(stated) > BODY_BYTES:
        raise too_large
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > BODY_BYTES:
            raise too_large
        more = message.get("more_body", False)
    return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    unread = True

    async def replay() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        message = await receive()
        while message["type"] != "http.disconnect":
            message = await receive()
        return message

    return replay
