"""Errors as HTTP: JSON with a status before an answer begins, the last event of a stream after that.

vLLM opens a stream with status 200 and writes an error that comes before the first token into it; `HonestStatus` makes
an HTTP error of it.
"""

from __future__ import annotations

import json
import logging

import msgspec
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from serve.asgi.error_shapes import as_anthropic, error_body, is_anthropic
from serve.asgi.exchange import Tap
from serve.errors import LoradockError

log = logging.getLogger(__name__)

_encode = msgspec.json.Encoder().encode
# How a stream opens that is none: OpenAI's, and Anthropic's.
_FIRST_ERRORS = (b'data: {"error"', b"event: error\ndata: {")


class HonestStatus:
    """Holds the status back until the first bytes, so that a stream which opens with an error gets its status."""

    __slots__ = ("_ended", "_send", "_start")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._ended = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if self._ended:
            return
        if self._start is not None:
            start, self._start = self._start, None
            if start["status"] == 200 and message.get("body", b"").startswith(_FIRST_ERRORS):
                start, message = _as_plain_error(start, message)
                self._ended = True
            await self._send(start)
        await self._send(message)


def _as_plain_error(start: Message, message: Message) -> tuple[Message, Message]:
    """A stream that opens with an error as a JSON answer with the error's status."""
    event = message["body"].split(b"\n\n", 1)[0]
    error = json.loads(event.partition(b"data: ")[2])
    code = error["error"].get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    body = json.dumps(error).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return (
        {**start, "status": status, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": False},
    )


async def send_error(error: LoradockError, scope: Scope, receive: Receive, tap: Tap) -> None:
    """The error as JSON with its status; as the last event, if a stream has begun and not ended."""
    if not tap.begun:
        body = error_body(error, scope["path"])
        response = JSONResponse(body, status_code=error.status, headers=error.headers())
        await response(scope, receive, tap.send)
        return
    log.warning("%s broke off: %s", scope["path"], error)
    if tap.events and not tap.ended:
        await tap.send({"type": "http.response.body", "body": _last_event(error, scope["path"]), "more_body": False})


def _last_event(error: LoradockError, path: str) -> bytes:
    """The event with which a stream of this API says that it breaks off."""
    body = error.body()["error"]
    if path == "/v1/responses":
        return b"event: error\ndata: " + _encode({"type": "error", **body}) + b"\n\n"
    if is_anthropic(path):
        return b"event: error\ndata: " + _encode(as_anthropic(body, error.status)) + b"\n\n"
    return b"data: " + _encode({"error": {**body, "code": error.status}}) + b"\n\n"
