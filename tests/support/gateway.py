"""A gateway before the server that holds its key: for clients that send none."""

from __future__ import annotations

import asyncio
import socket
import threading

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.support.listening import uvicorn_server

METHODS = ["GET", "POST", "DELETE"]
_OWN = {"host", "authorization", "content-length", "connection", "transfer-encoding", "content-encoding"}


class Gateway:
    """`with Gateway(url, key) as gateway`: what comes to `gateway.url` goes on to the server with the key, whole."""

    def __init__(self, upstream: str, key: str) -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        self._upstream, self._key = upstream, key
        app = Starlette(routes=[Route("/{path:path}", self._forward, methods=METHODS)])
        self._server = uvicorn_server(app)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(sock)))

    def __enter__(self) -> Gateway:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)

    async def _serve(self, sock: socket.socket) -> None:
        async with httpx.AsyncClient(base_url=self._upstream, timeout=120) as self._http:
            await self._server.serve([sock])

    async def _forward(self, request: Request) -> Response:
        headers = {name: value for name, value in request.headers.items() if name not in _OWN}
        answer = await self._http.request(
            request.method, request.url.path, params=request.query_params, content=await request.body(),
            headers={**headers, "authorization": f"Bearer {self._key}"},
        )  # fmt: skip
        kept = {name: value for name, value in answer.headers.items() if name not in _OWN}
        return Response(answer.content, answer.status_code, kept)
