"""How many askers a comparison has seen, and how their requests were dealt."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve.asgi.exchange import Exchange

State: TypeAlias = dict[str, NDArray]

# Askers that are told apart; beyond, those that were not seen for longest count again.
REMEMBERED = 20_000


class AskersSeen:
    """Not thread-safe. Keeps 8 bytes of a digest for each."""

    def __init__(self) -> None:
        self._recent: OrderedDict[int, None] = OrderedDict()
        self._distinct = 0
        self._by_request = False

    def observe(self, exchange: Exchange) -> None:
        """Note who asked."""
        self._by_request = exchange.counted_as is None or exchange.counted_as != exchange.asker
        if exchange.asker is None:
            return
        digest = hashlib.blake2b(exchange.asker, digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        if key not in self._recent:
            self._distinct += 1
        self._recent[key] = None
        self._recent.move_to_end(key)
        if len(self._recent) > REMEMBERED:
            self._recent.popitem(last=False)

    def report(self) -> dict[str, Any]:
        """For the API. `dealt_by` is how the latest request was."""
        return {"askers": self._distinct, "dealt_by": "request" if self._by_request else "asker"}

    def state(self) -> State:
        return {
            "seen_askers": np.array(list(self._recent), np.int64),
            "seen": np.array([self._distinct, self._by_request]),
        }

    def restore(self, state: Mapping[str, NDArray]) -> None:
        """Go on where `state()` was."""
        self._recent = OrderedDict.fromkeys(int(key) for key in state["seen_askers"])
        distinct, by_request = state["seen"].tolist()
        self._distinct, self._by_request = int(distinct), bool(by_request)
