"""Sends the tokens of a plain stream from the engine's output into the socket in one call.

For every token vLLM makes three objects, wakes a task and passes the token through four generators. With a small model
on a CPU that costs as much as the token itself. Almost every chunk of a plain stream is the chunk before it with
another text. So vLLM makes the first and the last chunks, and a `FastStream` makes those between from the first one:
`write` puts the new text in the place of the old. A stream that is not plain, or whose client reads too slowly, is left
to vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
from pydantic_core import to_json
from starlette.types import Message, Scope, Send

# The extension of a request's scope in which our HTTP protocol leaves its flow control.
FLOW = "loradock.flow"

# What stands before the text in a chunk, by route. No text can hold it: a quote in a text has a backslash before it.
PLACES = {"/v1/chat/completions": b'"delta":{"content":', "/v1/completions": b'"text":'}
# Fields that choose the tokens and do not change the form of a chunk.
_PLAIN = """
model messages prompt stream stream_options n max_tokens max_completion_tokens min_tokens temperature top_p top_k min_p
seed stop stop_token_ids ignore_eos presence_penalty frequency_penalty repetition_penalty logit_bias response_format
user metadata store priority cache_salt chat_template_kwargs add_generation_prompt
"""
PLAIN = frozenset(_PLAIN.split())


class Flow(Protocol):
    """uvicorn's flow control of one connection."""

    @property
    def write_paused(self) -> bool: ...


class FastStream:
    """One stream. The app sends through `send`, which learns the form of a chunk; the engine's output uses `write`."""

    __slots__ = ("_flow", "_head", "_place", "_send", "_tail", "in_order", "taken")

    def __init__(self, send: Send, flow: Flow, place: bytes) -> None:
        self._send = send
        self._flow = flow
        self._place = place
        self._head = self._tail = b""
        # The app has sent all that it was given: what is written now comes in the right order.
        self.in_order = False
        # A sequence of the engine uses this stream.
        self.taken = False

    @classmethod
    def of(cls, scope: Scope, fields: Mapping[str, Any], send: Send) -> FastStream | None:
        """The fast stream for a request with these fields, if it is plain."""
        flow = scope.get("extensions", {}).get(FLOW)
        place = PLACES.get(scope["path"])
        if flow is None or place is None or fields.get("stream") is not True or not fields.keys() <= PLAIN:
            return None
        options = fields.get("stream_options") or {}
        single = fields.get("n") in (None, 1) and isinstance(fields.get("prompt", ""), str)
        if not single or not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
            return None
        return cls(send, flow, place)

    @property
    def learned(self) -> bool:
        """The form of a chunk is known."""
        return bool(self._head)

    @property
    def blocked(self) -> bool:
        """The client reads more slowly than tokens come: whoever sends more has to wait."""
        return self._flow.write_paused

    async def send(self, message: Message) -> None:
        await self._send(message)
        body = message.get("body", b"")
        if not self.in_order and self._place in body:
            if not self._head:
                self._learn(body)
            self.in_order = self.learned

    def write(self, text: str) -> None:
        """Send a chunk with this text. Call it only while `in_order` and not `blocked`: then nothing in here waits."""
        chunk = self._head + to_json(text) + self._tail
        call = self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        try:
            call.send(None)  # type: ignore[attr-defined]
        except StopIteration:
            return
        raise RuntimeError("a send waited although the client reads")

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
