"""The shape of an error by the path that was asked: Anthropic's under /v1/messages, OpenAI's everywhere else.

    {"type": "error", "error": {"type", "message"}}          https://docs.claude.com/en/api/errors
    {"error": {"message", "type", "param", "code"}}

Anthropic's also has `param` and `code` where we know them; its clients pass over what they do not know.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
from starlette.types import Message, Send

from serve.errors import LoradockError

_encode = msgspec.json.Encoder().encode
_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_MOST = 64 << 10  # an error body that is longer passes as it is


def is_anthropic(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def error_body(error: LoradockError, path: str) -> dict[str, Any]:
    """The body that says this error to whoever asked `path`."""
    body = error.body()
    return as_anthropic(body["error"], error.status) if is_anthropic(path) else body


def as_anthropic(error: dict[str, Any], status: int) -> dict[str, Any]:
    """Anthropic's envelope of an error that has OpenAI's fields."""
    kind = _BY_STATUS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    # vLLM's `code` is the status once more.
    more = {name: error[name] for name in ("param", "code") if isinstance(error.get(name), str)}
    return {"type": "error", "error": {"type": kind, "message": str(error.get("message", "")), **more}}


class AnthropicErrors:
    """`send` for an answer under /v1/messages: vLLM's errors get Anthropic's envelope and names, the rest passes."""

    __slots__ = ("_body", "_send", "_start")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                self._start = message
                return
        elif self._start is not None:
            self._body += message.get("body", b"")
            if message.get("more_body") and len(self._body) <= _MOST:
                return
            start, self._start = self._start, None
            if not message.get("more_body"):
                start, message = _translated(start, self._body)
            else:
                message = {**message, "body": self._body}
            await self._send(start)
        elif message.get("body", b"").startswith(b"event: error"):
            message = {**message, "body": message["body"].replace(b'"internal_error"', b'"api_error"', 1)}
        await self._send(message)


def _translated(start: Message, body: bytes) -> tuple[Message, Message]:
    error: Any = None
    try:
        error = json.loads(body).get("error")
    except (ValueError, AttributeError):
        pass
    status = start["status"]
    if not isinstance(error, dict):
        error = {"message": body.decode("utf-8", "replace") or f"the engine answered {status}"}
    content = _encode(as_anthropic(error, status))
    framing = (b"content-length", b"content-type")
    headers = [header for header in start["headers"] if header[0].lower() not in framing]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    return {**start, "headers": headers}, {"type": "http.response.body", "body": content, "more_body": False}
