"""The ASGI endpoint for inference: auth > router > engine > tap.

vLLM's own app answers; this stands before it, turns the public model name into the leased version's id, and keeps the
lease exactly as long as the response is open, however it ends.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from serve.auth import Auth
from serve.auth import Scope as KeyScope
from serve.engine import LOW_PRIORITY
from serve.errors import BadRequest, LoradockError, NotFound, TooLarge
from serve.router import Route, Router
from serve.shadow import Kept, Shadows
from serve.tap import Exchange, Tap

log = logging.getLogger(__name__)

# What a client may reach of vLLM's app; its admin, lora and debugging routes stay unreachable.
PATHS = re.compile(
    r"/v1/(chat/completions(/batch)?|completions|responses|messages(/count_tokens)?|embeddings|score|rerank)"
    r"|/(tokenize|detokenize|pooling|classify|score|rerank|v2/rerank)"
)
STORED = re.compile(r"/v1/responses/[^/]+(/cancel)?")
MAX_BODY = 64 << 20

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder().encode


class Inference:
    """Every inference route."""

    def __init__(
        self, auth: Auth, router: Router, take: Callable[[Exchange], None], shadows: Shadows | None = None
    ) -> None:
        self._auth = auth
        self._router = router
        self._take = take
        self._shadows = shadows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await _refuse_socket(receive, send)
            return
        tap = Tap(send)
        try:
            await self._answer(scope, receive, tap)
        except LoradockError as error:
            await answer_error(error, scope, receive, tap)
        finally:
            tap.offer(self._take)

    async def _answer(self, scope: Scope, receive: Receive, tap: Tap) -> None:
        path = scope["path"]
        stored = STORED.fullmatch(path)
        if not stored and not PATHS.fullmatch(path):
            raise NotFound(f"there is nothing at {path}: see /v1/models and the README for what there is")
        caller = self._auth.caller(Headers(scope=scope), KeyScope.INFERENCE)
        asked = await _Asked.read(scope, receive) if scope["method"] == "POST" and not stored else None
        model = asked.model if asked else None
        async with self._router.lease(model, caller, asked.fields if asked else None) as route:
            tap.adapter, tap.version = route.adapter, route.version
            if asked:
                scope, receive = asked.replayed(scope, receive, route)
            kept = Kept(tap.send) if route.shadow and self._shadows else None
            await route.app(scope, receive, _Honest(kept.send if kept else tap.send).send)
        if kept and asked and route.shadow and self._shadows:
            self._shadows.offer(route.shadow, int(route.version[1:]), scope, asked.fields, kept)


class _Asked:
    """A JSON request body, read whole."""

    __slots__ = ("body", "fields", "model")

    def __init__(self, body: bytes) -> None:
        self.body = body
        try:
            self.fields = _decode(body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadRequest(f"the request body is not a JSON object: {error}") from error
        priority = self.fields.get("priority", 0)
        if isinstance(priority, int) and not 0 <= priority < LOW_PRIORITY:
            raise BadRequest(
                f"priority takes 0 to {LOW_PRIORITY - 1}: 0 is a client's turn, more waits longer", param="priority"
            )
        model = self.fields.get("model")
        if model is not None and not isinstance(model, str):
            raise BadRequest("model takes a string: GET /v1/models lists the names", param="model")
        self.model = model or None

    @classmethod
    async def read(cls, scope: Scope, receive: Receive) -> _Asked:
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BadRequest("the client left before its request was whole")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > MAX_BODY:
                raise TooLarge(f"the request body is above {MAX_BODY >> 20} MiB")
            more = message.get("more_body", False)
        return cls(b"".join(chunks))

    def replayed(self, scope: Scope, receive: Receive, route: Route) -> tuple[Scope, Receive]:
        """The same request, asking for the route's model by the backend's name for it."""
        body = self.body
        if route.model != self.model:
            body = _encode({**self.fields, "model": route.model})
            length = (b"content-length", str(len(body)).encode())
            headers = [h for h in scope["headers"] if h[0] not in (b"content-length", b"transfer-encoding")]
            scope = {**scope, "headers": [*headers, length]}
        unread = True

        async def replay() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        return scope, replay


class _Honest:
    """Holds an answer's status back until its first bytes, so that an error before the first token is an HTTP error.

    vLLM opens a 200 stream and then writes the error into it.
    """

    __slots__ = ("_send", "_start", "_told")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._told = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._told:
            return
        if self._start is not None:
            start, self._start = self._start, None
            if start["status"] == 200 and message.get("body", b"").startswith(b'data: {"error"'):
                start, message = _unstreamed(start, message)
                self._told = True
            await self._send(start)
        await self._send(message)


def _unstreamed(start: Message, message: Message) -> tuple[Message, Message]:
    """A stream that opens with an error as the plain error that it is."""
    error = json.loads(message["body"].removeprefix(b"data: ").split(b"\n\n", 1)[0])
    code = error["error"].get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    body = json.dumps(error).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return (
        {**start, "status": status, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": False},
    )


async def answer_error(error: LoradockError, scope: Scope, receive: Receive, tap: Tap) -> None:
    """The error as OpenAI's JSON, if the status has not gone out yet."""
    if tap.begun:
        log.warning("%s broke off: %s", scope["path"], error)
        return
    response = JSONResponse(error.body(), status_code=error.status, headers=error.headers())
    await response(scope, receive, tap.send)


async def _refuse_socket(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.close", "code": 1000, "reason": "this server speaks HTTP"})
