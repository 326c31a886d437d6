"""A backend whose streams go through the request's fast stream, as an engine's do, behind a server with sockets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from serve.asgi.exchange import watching
from serve.config import Config
from serve.server.assembly import build_app
from serve.server.connection import guarded
from serve.server.front_ends import FrontEnds
from tests.support.app import ready
from tests.support.backend import FakeBackend
from tests.support.listening import listening
from tests.support.waiting import settled


def chunk(model: str, content: str, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": reason}
    text = json.dumps({"id": "c-1", "model": model, "choices": [choice]}, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class Speaking(FakeBackend):
    """A stream says `words`, each with the model's name, and waits for `flow` before those from `waits` on."""

    words = 60
    waits = 30

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = await Request(scope, receive).json() if scope["method"] == "POST" else {}
        self._make(self.generation)
        if not body.get("stream"):
            await JSONResponse({"model": body.get("model")})(scope, receive, send)
            return
        self.running += 1
        talking = asyncio.create_task(self._talk(body, watching.get(), send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({talking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if talking.done():
                talking.result()
        finally:
            self.running -= 1
            for task in (talking, leaving):
                task.cancel()

    async def _talk(self, body: dict[str, Any], watch: Any, send: Any) -> None:
        model = body["model"]
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(self.words):
            if number == self.waits:
                await self.flow.wait()
            word = f" {model}\n"
            stream = watch.fast_stream
            if stream is not None and stream.in_order and not stream.has_tools and not stream.blocked:
                stream.write(word)
            else:
                await _send(send, chunk(model, word))
            await asyncio.sleep(0)
        await _send(send, chunk(model, " end", "length"))
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = json.dumps({"model": model, "choices": [], "usage": {"total_tokens": 5}})
            await _send(send, f"data: {usage}\n\n".encode())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


async def _send(send: Any, piece: bytes) -> None:
    await send({"type": "http.response.body", "body": piece, "more_body": True})


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


@asynccontextmanager
async def with_front_ends(app: Any, beside: int, **options: Any) -> AsyncIterator[tuple[str, FrontEnds]]:
    """The app's address, and so many processes beside this one that send its tokens."""
    front_ends = FrontEnds(beside)
    async with front_ends.running(), listening(app, http=guarded(30, front_ends=front_ends), **options) as url:
        assert await settled(lambda: len(front_ends.pids) == beside)
        yield url, front_ends


@asynccontextmanager
async def served(config: Config, backend: FakeBackend, beside: int) -> AsyncIterator[tuple[str, FrontEnds, Any]]:
    """The whole server over the backend, and its parts."""
    app = build_app(config, backend)  # type: ignore[arg-type]
    async with with_front_ends(app, beside, lifespan="on") as (url, front_ends):
        parts = app.state.parts
        await ready(app)
        yield url, front_ends, parts
