"""An inference request: read from the socket, checked, and rewritten for the engine that answers it."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope

from serve.engine.engine import LOW_PRIORITY
from serve.errors import BadRequest, NotFound, TooLarge
from serve.gateway.router import Route
from serve.gateway.tenant_isolation import check_response_owner, new_response_id, tenant_salt
from serve.names import DEFAULT

# What a client may reach of vLLM's app; its admin, lora and debugging routes stay unreachable.
PATHS = re.compile(
    r"/v1/(chat/completions(/batch)?|completions|responses|messages(/count_tokens)?|embeddings|score|rerank)"
    r"|/(tokenize|detokenize|pooling|classify|score|rerank|v2/rerank)"
)
STORED = re.compile(r"/v1/responses/(?P<id>[^/]+)(/cancel)?")
# Those that know no cache_salt, and fill no cache.
_WITHOUT_SALT = re.compile(r"/(de)?tokenize|/v1/messages/count_tokens")
_TOKENIZES = re.compile(r"/(de)?tokenize")
# Those whose body knows no priority.
_WITHOUT_PRIORITY = re.compile(r"/(de)?tokenize|/v1/messages(/count_tokens)?")
# vLLM's header for the rank that is to answer.
RANK = b"x-data-parallel-rank"
# Longer than any prompt that a text model has room for; images and sound come inside the body too.
TEXT_BYTES = 4 << 20
MEDIA_BYTES = 64 << 20
# These compute nothing, and take time and memory for each byte.
TOKENIZE_BYTES = 1 << 20
MAX_TIMEOUT = 86_400

_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder().encode


class InferenceRequest:
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
    async def read(cls, receive: Callable[[], Awaitable[Message]], limit: int) -> InferenceRequest:
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BadRequest("the client left before its request was whole")
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit:
                raise TooLarge(f"the request body is above {limit >> 20} MiB, the most that is taken here")
            more = message.get("more_body", False)
        return cls(b"".join(chunks))

    def rewritten(self, path: str, route: Route, tenant: str) -> dict[str, Any]:
        """The fields, asking for the route's model by the backend's name for it, within the caller's tenant."""
        changes: dict[str, Any] = {} if route.model == self.model else {"model": route.model}
        priority = self.fields.get("priority", 0)
        if (
            isinstance(priority, int)
            and route.priority not in (None, priority)
            and not _WITHOUT_PRIORITY.fullmatch(path)
        ):
            changes["priority"] = route.priority
        salt = None if _WITHOUT_SALT.fullmatch(path) else tenant_salt(self.fields.get("cache_salt"), tenant)
        if salt is not None:
            changes["cache_salt"] = salt
        if path == "/v1/responses":
            previous = self.fields.get("previous_response_id")
            if isinstance(previous, str):
                check_response_owner(previous, tenant)
            if tenant != DEFAULT:
                changes["request_id"] = new_response_id(tenant)
        return {**self.fields, **changes} if changes else self.fields

    def replay(self, scope: Scope, receive: Receive, fields: dict[str, Any], rank: int | None) -> tuple[Scope, Receive]:
        """The same request with these fields, for a data-parallel rank that the router chose."""
        body = self.body
        dropped = {RANK}
        added = [] if rank is None else [(RANK, str(rank).encode())]
        if fields is not self.fields:
            body = _encode(fields)
            dropped |= {b"content-length", b"transfer-encoding"}
            added.append((b"content-length", str(len(body)).encode()))
        headers = [header for header in scope["headers"] if header[0] not in dropped]
        unread = True

        async def replayed() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        return {**scope, "headers": [*headers, *added]}, replayed


def body_limit(path: str, headers: Headers, media: bool) -> int:
    """Bytes that the body of this request may have; TooLarge if it states more."""
    limit = TOKENIZE_BYTES if _TOKENIZES.fullmatch(path) else MEDIA_BYTES if media else TEXT_BYTES
    stated = headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > limit:
        raise TooLarge(f"the request body has {stated[:20]} bytes; {path} takes up to {limit >> 20} MiB")
    return limit


def stored_response(path: str) -> str | None:
    """The id of the stored response that a path names; None for a path that asks; NotFound for any other."""
    if stored := STORED.fullmatch(path):
        return stored["id"]
    if not PATHS.fullmatch(path):
        raise NotFound(f"there is nothing at {path}: see /v1/models and the README for what there is")
    return None


def requested_timeout(headers: Headers) -> float | None:
    """The client's X-Request-Timeout in seconds."""
    header = headers.get("x-request-timeout")
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise BadRequest(f"X-Request-Timeout takes seconds above 0 and up to {MAX_TIMEOUT}, not {header[:40]!r}")
    return seconds
