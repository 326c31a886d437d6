"""How much one API key may weigh in a verdict on a canary.

A request's `user` is free text, so one key can be any number of askers, and whoever may ask a shared adapter could
decide what becomes of it. So of each key so many ratings count and no more, whichever version they are of: were it so
many of each, a key would go on with the canary alone, and its own mood with it. The requests of a key whose tenant has
no say in the adapter count up to `ALONE`, and beyond as long as they are no more than all others together.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sized
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.asgi.exchange import Exchange

State: TypeAlias = dict[str, NDArray]

# Too few to decide anything.
ALONE = 20
# Keys that are told apart; further ones count together.
KEYS, REST = 10_000, 0


class KeyWeights:
    """What was counted of each key. A server without keys has none to bound. Not thread-safe."""

    def __init__(self) -> None:
        self._requests: Counter[int] = Counter()
        self._ratings: Counter[int] = Counter()
        self.requests_left_out = self.ratings_left_out = 0

    def takes_request(self, exchange: Exchange, has_say: bool) -> bool:
        """Whether the request counts; it is counted then. `has_say`: its tenant's requests count without a bound."""
        key = _digest(exchange.key, self._requests)
        count = self._requests[key]
        if exchange.key and not has_say and count >= max(ALONE, self._requests.total() - count):
            self.requests_left_out += 1
            return False
        self._requests[key] += 1
        return True

    def takes_rating(self, key: str, limit: int) -> bool:
        """Whether a rating counts; it is counted then."""
        named = _digest(key, self._ratings)
        if key and self._ratings[named] >= limit:
            self.ratings_left_out += 1
            return False
        self._ratings[named] += 1
        return True

    def report(self) -> dict[str, int]:
        """For the API: what did not count, because its key counted enough."""
        return {"requests_left_out": self.requests_left_out, "ratings_left_out": self.ratings_left_out}

    def state(self) -> State:
        return {
            "key_requests": np.array([[key, count] for key, count in self._requests.items()], np.int64).reshape(-1, 2),
            # Earlier releases counted by version, in the middle.
            "key_ratings": np.array([[key, 0, count] for key, count in self._ratings.items()], np.int64).reshape(-1, 3),
            "left_out": np.array([self.requests_left_out, self.ratings_left_out]),
        }

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where `state()` was."""
        self._requests = Counter({key: count for key, count in state["key_requests"].tolist()})
        self._ratings = Counter()
        for key, _, count in state["key_ratings"].tolist():
            self._ratings[key] += count
        self.requests_left_out, self.ratings_left_out = state["left_out"].tolist()


def _digest(key: str, counted: Sized) -> int:
    digest = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    return digest if len(counted) < KEYS else REST
