"""`app_of()`: thin routes over the parts of a server, and who answers for what went wrong.

a request:   app > auth > limits > router > engine > tap > monitor
an upload:   app > auth > upload > adapter > store > engine > registry
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from serve import __version__
from serve.adapters.fair_threads import FairThreads
from serve.api.dashboard.pages import pages
from serve.api.entrance import Entrance
from serve.api.openapi import DocumentedApi
from serve.api.reference.pages import reference_pages
from serve.api.routes import routers
from serve.asgi.error_shapes import as_anthropic, error_body, is_anthropic
from serve.asgi.origin import OriginCheck, origins
from serve.asgi.wrong_field import refused
from serve.auth.audit import Audit, Audited
from serve.auth.auth import Auth
from serve.auth.rate_limits import Meters, RouteBudgets
from serve.auth.token_check import TokenCheck
from serve.config import Config
from serve.errors import LoradockError
from serve.gateway.inference import Inference
from serve.gateway.request import PATHS, STORED
from serve.rollout.registry_sync import RegistrySync

if TYPE_CHECKING:
    from serve.auth.oidc import Tokens

# For what blocks, at least: half of them are one tenant's at most, and some wait for a download.
THREADS = 16


class Parts(Protocol):
    """What the app itself uses of a server; routes say what else (`serve.api.parts`)."""

    config: Config
    auth: Auth
    audit: Audit
    tokens: Tokens | None
    follower: RegistrySync | None
    inference: Inference
    meters: Meters

    def running(self) -> AbstractAsyncContextManager[None]: ...
    def doubted(self, error: LoradockError) -> LoradockError: ...


def app_of(parts: Parts) -> FastAPI:
    """The HTTP side of a server."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(FairThreads(max(THREADS, (os.cpu_count() or 1) + 4)))
        async with parts.running():
            yield

    app = DocumentedApi(
        title="loradock",
        version=__version__,
        lifespan=lifespan,
        middleware=_middleware(parts),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.parts = parts
    for router in [pages(), reference_pages(), *routers()]:
        app.router.routes.extend(router.routes)  # `include_router` builds each of them anew
    app.add_exception_handler(LoradockError, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_unexpected)
    return app


def _middleware(parts: Parts) -> list[Middleware]:
    """What a request passes before a route, in this order."""
    return [
        Middleware(
            OriginCheck,
            allowed=origins(parts.config.engine.get("allowed_origins")),
            is_open=lambda: parts.auth.open,
            answers=_is_inference,
        ),
        *([Middleware(TokenCheck, tokens=parts.tokens)] if parts.tokens else []),
        Middleware(_Split, inference=parts.inference),
        Middleware(Audited, audit=parts.audit),
        Middleware(
            Entrance,
            auth=parts.auth,
            budgets=RouteBudgets(parts.config.changes_per_minute, parts.config.reads_per_minute),
            bodies=parts.meters.bodies,
            fresh=parts.follower.fresh if parts.follower else None,
        ),
    ]


class _Split:
    """Sends inference straight to its endpoint: no other middleware or route stands between a token and the socket."""

    def __init__(self, app: Any, inference: Inference) -> None:
        self._app = app
        self._inference = inference

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        inference = scope["type"] == "websocket" or _is_inference(path)
        await (self._inference if inference else self._app)(scope, receive, send)


def _is_inference(path: str) -> bool:
    return bool(PATHS.fullmatch(path) or STORED.fullmatch(path))


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, LoradockError)
    answer: LoradockError = request.app.state.parts.doubted(error)
    body = error_body(answer, request.url.path)
    return JSONResponse(body, status_code=answer.status, headers=answer.headers())


async def _answer_unexpected(request: Request, error: Exception) -> Response:
    """A defect of this server: its log has the traceback."""
    message = f"{request.method} {request.url.path} failed here ({type(error).__name__}): the server's log says why"
    return await _answer(request, LoradockError(message))


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
    body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    if is_anthropic(request.url.path):
        body = as_anthropic(body["error"], error.status_code)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request.app, request.url.path)))
    return JSONResponse(body, status_code=error.status_code, headers=headers)


def _methods(app: FastAPI, path: str) -> set[str]:
    """What is taken at a path: starlette tells of one of its routes alone.

    An adapter's name may hold a slash, so an adapter's canary has the path of an adapter too: the longer one counts.
    """
    matching = [route for route in app.routes if isinstance(route, Route) and route.path_regex.match(path)]
    longest = max((route.path_format.count("/") for route in matching), default=0)
    return {method for route in matching if route.path_format.count("/") == longest for method in route.methods or ()}


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client left in the middle of its request: nobody reads this."""
    return Response(status_code=499)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return JSONResponse(refused(error.errors()).body(), status_code=400)
