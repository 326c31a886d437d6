"""Has tokens of an identity provider checked before anything asks who sends a request."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send


class Checks(Protocol):
    def check(self, headers: Mapping[str, str], /) -> Awaitable[None]: ...


class TokenCheck:
    """Stands before everything that asks who sends a request."""

    def __init__(self, app: ASGIApp, tokens: Checks) -> None:
        self._app, self._tokens = app, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            await self._tokens.check(Headers(scope=scope))
        await self._app(scope, receive, send)
