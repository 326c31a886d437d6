"""Counts the tokens of an answer as it passes, for keys that have a limit of them; never touches a byte of it.

A JSON answer says its `usage`. So does a stream, if the client asked for it (`stream_options.include_usage`; Responses
and Messages always do). For any other stream the count is an estimate: a token for each event, and a token for every
four bytes of the request. Speculative decoding and `n` > 1 put more than a token into an event, so it may be low.
"""

from __future__ import annotations

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Send

from serve.auth.rate_limits import Meter

BYTES_PER_TOKEN = 4
# An answer above this is not kept to look for its usage; a request is then charged by its own size.
_KEPT = 16 << 20


class _Tokens(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None


class _Inner(msgspec.Struct):
    usage: _Tokens | None = None


class _Answer(msgspec.Struct):
    usage: _Tokens | None = None
    response: _Inner | None = None  # response.completed of the Responses API
    message: _Inner | None = None  # message_start of the Messages API


_decode = msgspec.json.Decoder(_Answer).decode


class Usage:
    """Stands in the way of an answer to a request whose body has `asked` bytes."""

    __slots__ = ("_events", "_given", "_kept", "_meter", "_ok", "_send", "_stream", "_taken", "asked")

    def __init__(self, send: Send, meter: Meter) -> None:
        self.asked = 0
        self._send = send
        self._meter = meter
        self._ok = self._stream = False
        self._kept = bytearray()
        self._events = 0
        self._taken = self._given = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._ok = message["status"] < 300
            self._stream = Headers(raw=message["headers"]).get("content-type", "").startswith("text/event-stream")
            headers = MutableHeaders(raw=list(message["headers"]))
            headers.update(self._meter.headers())
            message = {**message, "headers": headers.raw}
        elif self._ok and self._meter.counts_tokens:
            self._read(message.get("body", b""))
        await self._send(message)

    @property
    def tokens(self) -> int:
        """What the answer has cost so far."""
        if not self._ok:
            return 0
        if not self._stream and not self._taken + self._given:
            self._look(bytes(self._kept))
        if self._taken + self._given:
            return self._taken + self._given
        estimated = self._stream or len(self._kept) > _KEPT
        return self._events + self.asked // BYTES_PER_TOKEN if estimated else 0

    def _read(self, body: bytes) -> None:
        if len(self._kept) <= _KEPT:
            self._kept += body
        if not self._stream:
            return
        *lines, rest = bytes(self._kept).split(b"\n")
        self._kept = bytearray(rest[:_KEPT])
        for line in lines:
            if line.startswith(b"data: {"):
                self._events += 1
                # In a text that was generated the second quote has a backslash before it.
                if b'"usage"' in line:
                    self._look(line[6:])

    def _look(self, data: bytes) -> None:
        try:
            answer = _decode(data)
        except msgspec.DecodeError:
            return
        for part in (answer, answer.response, answer.message):
            if part and (told := part.usage):
                self._taken = max(self._taken, told.prompt_tokens or told.input_tokens or 0)
                given = told.completion_tokens or told.output_tokens or (told.total_tokens or 0) - self._taken
                self._given = max(self._given, given)
