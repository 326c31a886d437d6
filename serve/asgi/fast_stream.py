"""Sends the tokens of a plain stream from the engine's output into the socket in one call.

For every token vLLM makes three objects, wakes a task and passes the token through four generators. With a small model
on a CPU that costs as much as the token itself. Almost every chunk of a plain stream is the chunk before it with
another text. So vLLM makes the first and the last chunks, and a `FastStream` makes those between from the first one:
`write` puts the new text in the place of the old, and writes to the connection itself, unless somebody on the way has
to see every piece. A stream that is not plain, or whose client reads too slowly, is left to vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
from pydantic_core import to_json
from starlette.types import Message, Scope, Send

from serve.asgi.connection import BODY, AnswerBody, Writer
from serve.errors import LoradockError

# The extension of a request's scope in which our HTTP protocol leaves its flow control.
FLOW = "loradock.flow"

# What stands before the text in a chunk, by route. No text can hold it: a quote in a text has a backslash before it.
PLACES = {"/v1/chat/completions": b'"delta":{"content":', "/v1/completions": b'"text":'}
# A stream is a long one after so many pieces. Handing it over and having it back costs about as much as ten of them.
LONG = 16
# Fields that choose the tokens and do not change the form of a chunk.
_PLAIN = """
model messages prompt stream stream_options n max_tokens max_completion_tokens min_tokens temperature top_p top_k min_p
seed stop stop_token_ids ignore_eos presence_penalty frequency_penalty repetition_penalty logit_bias response_format
user metadata store priority cache_salt chat_template_kwargs add_generation_prompt
"""
PLAIN = frozenset(_PLAIN.split())
# Beside them, where vLLM makes the pieces.
TOOLS, LOGPROBS = frozenset({"tools", "tool_choice"}), frozenset({"logprobs", "top_logprobs"})
_DELTA = b'"delta":'


class Flow(Protocol):
    """uvicorn's flow control of one connection."""

    @property
    def write_paused(self) -> bool: ...


_NULL = msgspec.Raw(b"null")


class _Choice(msgspec.Struct):
    delta: msgspec.Raw
    finish_reason: str | None = None
    logprobs: msgspec.Raw = _NULL


class _Chunk(msgspec.Struct):
    choices: list[_Choice]
    usage: msgspec.Raw = _NULL


class Parser(Protocol):
    """What makes the pieces of a stream that is not plain."""

    @property
    def begun(self) -> bool:
        """It made pieces already."""


class Call(Protocol):
    """The call that the stream is the answer to."""

    @property
    def is_cut(self) -> bool:
        """Nothing more of it is sent."""

    def cut(self, error: LoradockError) -> None:
        """End it with this error."""


class FastStream:
    """One stream. The app sends through `send`, which learns the form of a chunk; the engine's output uses `write`."""

    __slots__ = (
        "_body",
        "_call",
        "_count",
        "_flow",
        "_head",
        "_middle",
        "_place",
        "_send",
        "_tail",
        "_writer",
        "has_logprobs",
        "has_tools",
        "in_order",
        "parsed",
        "parser",
        "taken",
    )

    def __init__(
        self, send: Send, flow: Flow, place: bytes, call: Call | None = None, body: AnswerBody | None = None
    ) -> None:
        self._send = send
        self._call = call
        self._body = body
        self._flow = flow
        self._place = place
        self._head = self._middle = self._tail = b""
        self._count = 0
        # The other process that sends what is said.
        self._writer: Writer | None = None
        # The app has sent all that it was given: what is written now comes in the right order.
        self.in_order = False
        # A sequence of the engine uses this stream.
        self.taken = False
        # The request names tools: text may be a call.
        self.has_tools = False
        # The client asks for the tokens' log-probabilities.
        self.has_logprobs = False
        # Chunks differ in their whole delta, as a parser makes it.
        self.parsed = False
        self.parser: Parser | None = None

    @classmethod
    def of(cls, scope: Scope, fields: Mapping[str, Any], send: Send, call: Call | None = None) -> FastStream | None:
        """The fast stream for a request with these fields, if it is plain. call: its pieces need not pass `send`."""
        extensions = scope.get("extensions", {})
        flow = extensions.get(FLOW)
        place = PLACES.get(scope["path"])
        if flow is None or place is None or fields.get("stream") is not True:
            return None
        parsed = TOOLS | LOGPROBS if _DELTA in place else frozenset()
        if not fields.keys() <= PLAIN | parsed:
            return None
        has_tools = not fields.keys() <= PLAIN | LOGPROBS
        if has_tools and fields.get("tool_choice", "auto") != "auto":
            return None
        options = fields.get("stream_options") or {}
        single = fields.get("n") in (None, 1) and isinstance(fields.get("prompt", ""), str)
        if not single or not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
            return None
        stream = cls(send, flow, place, call, extensions.get(BODY))
        stream.has_tools = has_tools
        stream.has_logprobs = bool(fields.get("logprobs"))
        return stream

    @property
    def learned(self) -> bool:
        """The form of a chunk is known."""
        return bool(self._head)

    @property
    def blocked(self) -> bool:
        """The client reads more slowly than tokens come: whoever sends more has to wait."""
        return self._flow.write_paused

    @property
    def is_handed(self) -> bool:
        """Another process sends what is said: it has its turn, and is not `blocked`."""
        return self._writer is not None and self._writer.is_there

    async def send(self, message: Message) -> None:
        await self._send(message)
        body = message.get("body", b"")
        if self.parsed:
            if not self._head and _DELTA in body:
                self._learn_delta(body)
        elif not self.in_order and self._place in body:
            if not self._head:
                self._learn(body)
            self.in_order = self.learned

    def write(self, text: str) -> None:
        """Send a chunk with this text. Call it only while `in_order` and not `blocked`: then nothing in here waits."""
        if self.is_handed:
            self.say(text)
        else:
            self._write(to_json(text))

    def say(self, text: str) -> None:
        """The same, of one that `is_handed`."""
        if self._writer is not None and self._call is not None and not self._call.is_cut:
            self._writer.say(text)

    def write_delta(self, delta: bytes, logprobs: bytes = b"") -> None:
        """Send a chunk with this delta, JSON, by the same rules; one of a `parsed` stream that has `learned`. A stream
        that `has_logprobs` has JSON of them in each chunk."""
        self._write(delta + self._middle + logprobs)

    def _write(self, piece: bytes) -> None:
        chunk = self._head + piece + self._tail
        body = self._body
        if self._call is not None and body is not None and body.is_open:
            if not self._call.is_cut:
                self._count += 1
                if self._count % LONG == 0:
                    self._hand_over(body, self._call)
                body.write(chunk)
            return
        call = self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        try:
            call.send(None)  # type: ignore[attr-defined]
        except StopIteration:
            return
        raise RuntimeError("a send waited although the client reads")

    def _hand_over(self, body: AnswerBody, call: Call) -> None:
        writer = body.hand_over(call.cut)
        if writer is not None and not self.parsed:
            writer.form(self._head, self._tail)
            self._writer = writer

    def _learn(self, body: bytes) -> None:
        """Cut vLLM's first chunk at its text."""
        head, place, rest = body.partition(self._place)
        try:
            chunk = msgspec.json.decode(body.removeprefix(b"data: "))
            if chunk.get("usage") is not None:  # it counts on from chunk to chunk
                return
            choice = chunk["choices"][0]
            first_text = choice["text"] if "text" in choice else choice["delta"]["content"]
        except (msgspec.DecodeError, AttributeError, KeyError, IndexError, TypeError):
            return
        text = to_json(first_text)
        if rest.startswith(text) and b'"finish_reason":null' in rest:
            self._head, self._tail = head + place, rest[len(text) :]

    def _learn_delta(self, body: bytes) -> None:
        """Cut a chunk of vLLM's at its delta: not the first, which names the role, nor one that has more to tell."""
        head, place, rest = body.partition(_DELTA)
        try:
            chunk = msgspec.json.decode(body.removeprefix(b"data: "), type=_Chunk)
        except msgspec.DecodeError:
            return
        (choice,) = chunk.choices if len(chunk.choices) == 1 else (None,)
        if choice is None or choice.finish_reason is not None or bytes(chunk.usage) != b"null":
            return
        delta, logprobs = bytes(choice.delta), bytes(choice.logprobs)
        if b'"role"' in delta or not rest.startswith(delta) or (logprobs != b"null") != self.has_logprobs:
            return
        rest = rest[len(delta) :]
        if self.has_logprobs:
            middle, found, rest = rest.partition(b'"logprobs":')
            if not found or not rest.startswith(logprobs):
                return
            self._middle, rest = middle + found, rest[len(logprobs) :]
        self._head, self._tail = head + place, rest
