"""Before a route reads a body: who sends it, whether their key has had its share, how long it is, and what it holds.

FastAPI reads a body whole before any dependency runs. So the key is looked at here, first: without a known one the
route sees no body and answers as it does to anybody without a key. Inference has the same steps in its own endpoint.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from contextlib import nullcontext

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.adapters.fair_threads import in_the_name_of
from serve.asgi.cancellation import cancelled_on_disconnect
from serve.asgi.connection import recognise
from serve.asgi.json_weight import check
from serve.asgi.origin import READS
from serve.asgi.request_body import read, replayed
from serve.auth.auth import Auth, Caller
from serve.auth.body_memory import BodyMemory
from serve.auth.rate_limits import RouteBudgets
from serve.errors import ClientLeft, LoradockError

BODY_BYTES = 1 << 20
# A baseline's file, which is no JSON.
BASELINE = re.compile(r"PUT /v1/adapters/.+/baseline")
BASELINE_BYTES = 64 << 20
# They write their body to the disk piece by piece, up to a limit of their own: an upload, a file, what a worker brings.
STREAMED = re.compile(r"POST /v1/adapters|POST /v1/files|PUT /v1/fine_tuning/work/.+/files/.+")


# An answer is rated, and a text looked at, as often as one is asked for.
READING_POSTS = ("/v1/feedback", "/v1/moderations")


class Entrance:
    """`fresh` returns once this server sees the keys that others issued or revoked before."""

    def __init__(
        self,
        app: ASGIApp,
        auth: Auth,
        budgets: RouteBudgets,
        bodies: BodyMemory,
        fresh: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._app = app
        self._auth = auth
        self._budgets = budgets
        self._bodies = bodies
        self._fresh = fresh

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reads = scope["method"] in READS
        try:
            if self._fresh and not reads:  # a route that reads does that itself
                await self._fresh()
            caller = self._auth.known(Headers(scope=scope))
        except LoradockError:
            await self._app(scope, replayed(b"", receive), send)  # the route refuses in its own words, and is audited
            return
        recognise(scope)
        try:
            with in_the_name_of(caller.tenant), self._bodies.held(caller.tenant) as take:
                receive = await self._admitted(scope, receive, caller, take)
                async with cancelled_on_disconnect(receive) if reads else nullcontext():
                    await self._app(scope, replayed(b"", receive) if reads else receive, send)
        except ClientLeft:
            return
        except LoradockError as error:
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)

    async def _admitted(self, scope: Scope, receive: Receive, caller: Caller, take: Callable[[int], None]) -> Receive:
        """What a route may read of the body; RateLimited, Overloaded, TooLarge or BadRequest."""
        reads = scope["method"] in READS
        if not caller.operator:
            kind = "reads" if reads or scope["path"] in READING_POSTS else "changes"
            self._budgets.take(caller.key, caller.limits, kind)
        if reads:
            return receive
        request, headers = f"{scope['method']} {scope['path']}", Headers(scope=scope)
        is_json = headers.get("content-type", "").strip().lower().startswith("application/json")
        if STREAMED.fullmatch(request) and not is_json:  # a push by address is JSON
            return receive
        is_baseline = bool(BASELINE.fullmatch(request))
        body = await read(receive, headers, BASELINE_BYTES if is_baseline else BODY_BYTES, scope["path"], take)
        if not is_baseline:
            check(body)
        return replayed(body, receive)
