"""Who said what about an answer: a rating, or what it should have been, is joined to the request by its id.

No text is kept, neither of a question nor of an answer: 16-byte digests of both, of each tenant's last requests.

An id is the server's, which one request has; or the client's own for it, which many may have. Then it is the latest one
of the same API key; or of the one key that has such a request. Of several other keys it is none: any of them could have
taken the name of another's.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

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
    """What is remembered of a request; `asker` and `digest` are digests, `key` is the API key's id."""

    id: str
    client_id: str
    key: str
    adapter: str
    version: str
    dealt: bool
    asker: bytes | None
    digest: bytes
    rating: float | None = None
    trace: RequestTrace | None = None

    def withdraw(self) -> None:
        """Nobody has said anything of it yet."""
        self.rating = None


@dataclass(slots=True)
class _Recent:
    """The recent requests of one tenant."""

    by_id: OrderedDict[str, Answered] = field(default_factory=OrderedDict)
    # By the client's id for it and by its key: the id of the latest one.
    named: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, answered: Answered) -> None:
        self.by_id[answered.id] = answered
        if answered.client_id:
            self.named.setdefault(answered.client_id, {})[answered.key] = answered.id

    def forget_oldest(self) -> None:
        _, oldest = self.by_id.popitem(last=False)
        holders = self.named.get(oldest.client_id, {})
        if holders.get(oldest.key) == oldest.id:
            del holders[oldest.key]
            if not holders:
                del self.named[oldest.client_id]

    def find(self, key: str, id: str) -> Answered | None:
        """The request with this id, as it is asked for with this key."""
        if answered := self.by_id.get(id) or self.by_id.get(bare_id(id)):
            return answered
        own = named_by(key, self.named.get(id, {}))
        return None if own is None else self.by_id[own]


class Feedback:
    """The recent requests, at most `memory` of a tenant: none makes another's forgotten."""

    def __init__(self, memory: int = 10_000) -> None:
        self._memory = memory
        self._recent: dict[str, _Recent] = {}

    def remember(self, exchange: Exchange) -> None:
        """Take note of an answer, and forget the oldest beyond the limit."""
        if exchange.status != 200 or not exchange.generations:
            return
        # Only one rating of those who share a draw counts.
        asker = None if exchange.counted_as is None else _hashed(exchange.counted_as)
        answer = _digest(exchange.generations[0].text)
        recent = self._recent.setdefault(exchange.tenant, _Recent())
        ids = exchange.request_id, exchange.client_id, exchange.key
        recent.add(
            Answered(*ids, exchange.adapter, exchange.version, exchange.dealt, asker, answer, trace=exchange.trace)
        )
        if len(recent.by_id) > self._memory:
            recent.forget_oldest()

    def find(self, tenant: str, key: str, request_id: str) -> Answered | None:
        """The recent request that this id means, as `join` looks for it."""
        return self._recent.get(tenant, _Recent()).find(key, request_id)

    def join(
        self, tenant: str, key: str, request_id: str, rating: float | None, answer: str | None
    ) -> tuple[Answered, float]:
        """The request that the feedback is about, and its rating from 0 to 1; each request is rated once.

        Who says so comes with the API key of the id `key`.
        """
        if (rating is None) == (answer is None):
            raise BadRequest("feedback takes a rating from 0 to 1, or the correct answer, and not both", param="rating")
        if rating is not None and not 0 <= rating <= 1:
            raise BadRequest(f"a rating lies between 0 (bad) and 1 (good), not {rating}", param="rating")
        answered = self.find(tenant, key, request_id)
        if answered is None or answered.rating is not None:
            raise NotFound(
                "no recent request of this tenant has this id alone and no feedback yet: send an answer's id, or its "
                f"x-request-id header, within {self._memory} requests",
                param="request_id",
            )
        answered.rating = rating if rating is not None else float(_digest(answer or "") == answered.digest)
        return answered, answered.rating


def named_by(key: str, holders: Mapping[str, str]) -> str | None:
    """Which request a client's own id means to whoever has `key`; `holders` has the latest one of each key."""
    if key in holders:
        return holders[key]
    return next(iter(holders.values())) if len(holders) == 1 else None


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
