"""The short way of a plain stream's tokens: from the engine's output into the socket, in one call.

vLLM makes three objects of every token, wakes a task for it and sends it up through four generators; on a small model
on a CPU that costs as much as the token. Almost every chunk of a plain stream is the one before it with another text,
so here vLLM makes the first and the last ones, and those between are made from its first: `write` puts the text where
that one's was. What is not plain, or a client who reads too slowly, goes vLLM's way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
from pydantic_core import to_json
from starlette.types import Message, Scope, Send

# Where a protocol of ours leaves its flow control in the scope of a request.
FLOW = "loradock.flow"

# The text's place in a chunk, by route. A text before it cannot hold this: its quotes would have a backslash.
PLACES = {"/v1/chat/completions": b'"delta":{"content":', "/v1/completions": b'"text":'}
# What says which tokens come, and nothing of how they are told.
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
    """One stream. `send` stands before the app's own and learns from what passes; `write` is the short way."""

    __slots__ = ("_flow", "_head", "_place", "_send", "_tail", "clear", "taken")

    def __init__(self, send: Send, flow: Flow, place: bytes) -> None:
        self._send = send
        self._flow = flow
        self._place = place
        self._head = self._tail = b""
        # Nothing is under way by the app's way: what is written now comes in its turn.
        self.clear = False
        # A sequence of the engine goes this way.
        self.taken = False

    @property
    def learnt(self) -> bool:
        return bool(self._head)

    @property
    def blocked(self) -> bool:
        """The client reads more slowly than it is sent to: somebody has to wait for it."""
        return self._flow.write_paused

    async def send(self, message: Message) -> None:
        await self._send(message)
        body = message.get("body", b"")
        if not self.clear and self._place in body:
            if not self._head:
                self._learn(body)
            self.clear = self.learnt

    def write(self, text: str) -> None:
        """A chunk with this text. To be called when it is `clear` and not `blocked`: nothing waits in here then."""
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
            choice = msgspec.json.decode(body.removeprefix(b"data: "))["choices"][0]
            said = choice["text"] if "text" in choice else choice["delta"]["content"]
        except (msgspec.DecodeError, KeyError, IndexError, TypeError):
            return
        text = to_json(said)
        if rest.startswith(text) and b'"finish_reason":null' in rest:
            self._head, self._tail = head + place, rest[len(text) :]


def express(scope: Scope, fields: Mapping[str, Any], send: Send) -> FastStream | None:
    """The short way for this request, if it is plain."""
    flow = scope.get("extensions", {}).get(FLOW)
    place = PLACES.get(scope["path"])
    if flow is None or place is None or fields.get("stream") is not True or not fields.keys() <= PLAIN:
        return None
    options = fields.get("stream_options") or {}
    one = fields.get("n") in (None, 1) and isinstance(fields.get("prompt", ""), str)
    if not one or not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
        return None
    return FastStream(send, flow, place)
