"""What a web page on another site may do here: nothing, unless its origin is allowed.

A browser sends requests for whatever page it shows, also to servers on its own machine, and takes a host name for this
server's because some DNS answer said so (DNS rebinding). So:

    Host           without keys it must be a name of this machine itself; an allowed origin's host is taken too
    Origin,        a request that may change something is refused when a page of another origin sends it
    Sec-Fetch-Site
    OPTIONS        a preflight is answered here, before any key is asked: it carries none

The Fetch standard: https://fetch.spec.whatwg.org (CORS protocol); Fetch Metadata: https://www.w3.org/TR/fetch-metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.asgi.error_shapes import error_body
from serve.errors import Forbidden

READS = frozenset({"GET", "HEAD", "OPTIONS"})
PREFLIGHT_SECONDS = 600
EXPOSED = "x-request-id, x-loradock-version, x-loradock-registry-age, retry-after, etag"


def origins(option: object) -> frozenset[str]:
    """Allowed origins as a list, as JSON's text of one, or separated by commas; `*` stands for every origin."""
    if isinstance(option, str):
        text = option.strip()
        option = json.loads(text) if text.startswith("[") else text.split(",")
    named = option if isinstance(option, Iterable) else ()
    return frozenset(str(origin).strip().rstrip("/").lower() for origin in named if str(origin).strip())


class OriginCheck:
    """Stands before everything else. `is_open` says that nobody has a key; `answers` that a path is inference."""

    def __init__(
        self,
        app: ASGIApp,
        allowed: frozenset[str],
        is_open: Callable[[], bool],
        answers: Callable[[str], bool],
    ) -> None:
        self._app = app
        self._allowed = allowed
        self._hosts = {urlsplit(origin).hostname for origin in allowed}
        self._is_open = is_open
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._is_open() and not self._is_own(host):
            await self._refuse(
                f"without keys this server answers to a name of its own machine alone, not to {host[:100]!r}: "
                "ask for localhost, or set api_keys and admin_keys",
                scope, receive, send,
            )  # fmt: skip
            return
        origin = headers.get("origin", "").lower()
        if not origin or scope["type"] == "websocket":
            if headers.get("sec-fetch-site") in ("cross-site", "same-site") and scope.get("method") not in READS:
                await self._refuse("a page of another site may change nothing here", scope, receive, send)
                return
            await self._app(scope, receive, send)
            return
        if origin in self._allowed or "*" in self._allowed:
            await self._share(scope, headers, receive, send)
        elif scope["method"] not in READS and not self._may(scope, origin, host):
            await self._refuse(
                f"a page of {origin[:100]} may change nothing here: add it to allowed_origins if it is yours",
                scope, receive, send,
            )  # fmt: skip
        else:
            await self._app(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False  # "[::1" is no host
        if not host or name == "localhost" or name.endswith(".localhost") or name in self._hosts:
            return True
        try:
            return ip_address(name).is_loopback
        except ValueError:
            return False

    def _may(self, scope: Scope, origin: str, host: str) -> bool:
        """A page of this server's own; or one that asks for an answer with a key, or from this same machine."""
        place = origin.partition("://")[2]
        if place == host.lower():
            return True
        return self._answers(scope["path"]) and (not self._is_open() or self._is_own(place))

    async def _share(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        origin = headers["origin"]
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            answer = Response(status_code=204)
            answer.headers["access-control-allow-origin"] = origin
            answer.headers["access-control-allow-methods"] = "GET, POST, PUT, DELETE"
            asked = headers.get("access-control-request-headers", "")
            answer.headers["access-control-allow-headers"] = asked or "authorization, content-type"
            answer.headers["access-control-max-age"] = str(PREFLIGHT_SECONDS)
            answer.headers["vary"] = "origin"
            await answer(scope, receive, send)
            return

        async def shared(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                answered["access-control-allow-origin"] = origin
                answered["access-control-expose-headers"] = EXPOSED
                answered.add_vary_header("origin")
            await send(message)

        await self._app(scope, receive, shared)

    async def _refuse(self, message: str, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": message[:120]})
            return
        error = Forbidden(message)
        await JSONResponse(error_body(error, scope["path"]), status_code=error.status)(scope, receive, send)
