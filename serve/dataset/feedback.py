"""Who said what about an answer: a rating, or what it should have been, is joined to the request by its id.

No text is kept, neither of a question nor of an answer: 16-byte digests of both, of the last `memory` requests.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from dataclasses import dataclass

from serve.asgi.exchange import Exchange
from serve.asgi.trace_context import RequestTrace
from serve.errors import BadRequest, NotFound

# The ids of answers have the request's in them.
_PREFIXES = re.compile(r"^(chatcmpl|cmpl|resp|msg|embd|pool|classify|score|rerank)[-_]")
_BARE = re.compile(r"\W+")
_BARE_ASCII = bytes(code for code in range(128) if not (chr(code).isalnum() or chr(code) == "_"))
# Of a longer text the beginning is compared: it is looked at on the event loop.
COMPARED = 2000
# What has this rating or more was a good answer.
GOOD = 0.5


@dataclass(slots=True)
class Answered:
    """What is remembered of a request; `asker` and `digest` are digests."""

    adapter: str
    version: str
    dealt: bool
    asker: bytes | None
    digest: bytes
    rating: float | None = None
    trace: RequestTrace | None = None


class Feedback:
    """The recent requests of all tenants, by tenant and id."""

    def __init__(self, memory: int = 10_000) -> None:
        self._memory = memory
        self._recent: OrderedDict[tuple[str, str], Answered] = OrderedDict()

    def remember(self, exchange: Exchange) -> None:
        """Take note of an answer, and forget the oldest beyond the limit."""
        if exchange.status != 200 or not exchange.generations:
            return
        key = (exchange.tenant, exchange.request_id)
        # Only one rating of those who share a draw counts.
        asker = None if exchange.counted_as is None else _hashed(exchange.counted_as)
        answer = _digest(exchange.generations[0].text)
        self._recent.pop(key, None)
        self._recent[key] = Answered(
            exchange.adapter, exchange.version, exchange.dealt, asker, answer, trace=exchange.trace
        )
        if len(self._recent) > self._memory:
            self._recent.popitem(last=False)

    def join(self, tenant: str, request_id: str, rating: float | None, answer: str | None) -> tuple[Answered, float]:
        """The request that the feedback is about, and its rating from 0 to 1; each request is rated once."""
        if (rating is None) == (answer is None):
            raise BadRequest("feedback takes a rating from 0 to 1, or the correct answer, and not both", param="rating")
        if rating is not None and not 0 <= rating <= 1:
            raise BadRequest(f"a rating lies between 0 (bad) and 1 (good), not {rating}", param="rating")
        answered = self._recent.get((tenant, request_id))
        if answered is None:
            answered = self._recent.get((tenant, bare_id(request_id)))
        if answered is None or answered.rating is not None:
            raise NotFound(
                "no recent request of this tenant has this id and no feedback yet: send an answer's id, or its "
                f"x-request-id header, within {self._memory} requests",
                param="request_id",
            )
        answered.rating = rating if rating is not None else float(_digest(answer or "") == answered.digest)
        return answered, answered.rating


def bare_id(id: str) -> str:
    """A request's id, by its answer's."""
    return _PREFIXES.sub("", id)


def _digest(text: str) -> bytes:
    """Equal for texts that differ in case, spaces and punctuation only."""
    text = text[:COMPARED].casefold()
    if text.isascii():
        return _hashed(text.encode().translate(None, _BARE_ASCII))
    return _hashed(_BARE.sub("", text).encode("utf-8", "surrogatepass"))


def _hashed(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
