"""Before a route reads a body: who sends it, whether their key has had its share, how long it is, and what it holds.

FastAPI reads a body whole before any dependency runs. So the key is looked at here, first: without a known one the
route sees no body and answers as it does to anybody without a key. Inference has the same steps in its own endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.asgi.connection import recognise
from serve.asgi.json_weight import check
from serve.asgi.origin import READS
from serve.asgi.request_body import read, replayed
from serve.auth.auth import Auth
from serve.errors import ClientLeft, LoradockError

BODY_BYTES = 1 << 20
# A baseline's file, which is no JSON.
BASELINE = re.compile(r"PUT /v1/adapters/.+/baseline")
BASELINE_BYTES = 64 << 20
# They write their body to the disk piece by piece, up to a limit of their own: an upload, a file, what a worker brings.
STREAMED = re.compile(r"POST /v1/adapters|POST /v1/files|PUT /v1/fine_tuning/work/.+/files/.+")


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
            await self._app(scope, replayed(b"", receive), send)  # the route refuses in its own words, and is audited
            return
        recognise(scope)
        try:
            receive = await self._admitted(scope, receive)
        except ClientLeft:
            return
        except LoradockError as error:
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _admitted(self, scope: Scope, receive: Receive) -> Receive:
        """What a route may read of the body."""
        request, headers = f"{scope['method']} {scope['path']}", Headers(scope=scope)
        is_json = headers.get("content-type", "").strip().lower().startswith("application/json")
        if STREAMED.fullmatch(request) and not is_json:  # a push by address is JSON
            return receive
        is_baseline = bool(BASELINE.fullmatch(request))
        body = await read(receive, headers, BASELINE_BYTES if is_baseline else BODY_BYTES, scope["path"])
        if not is_baseline:
            check(body)
        return replayed(body, receive)
