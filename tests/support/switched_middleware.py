"""The middleware of Ray's proxies, which a file that is there turns off: what it costs is measured in one process.

`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middleware`, and `VARIABLE` the file.
"""

from __future__ import annotations

import os

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.server.ray_proxy import ModelHeader

IMPORT_PATH = "tests.support.switched_middleware:middleware"
VARIABLE = "TESTS_MIDDLEWARE_OFF"


def middleware() -> list[Middleware]:
    return [Middleware(Switched, off=os.environ[VARIABLE])]


class Switched:
    def __init__(self, app: ASGIApp, off: str) -> None:
        self._without, self._with = app, ModelHeader(app)
        self._off = off

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._without if os.path.exists(self._off) else self._with
        await app(scope, receive, send)
