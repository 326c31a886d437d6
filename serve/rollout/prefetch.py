"""Which adapters are asked most, lately: a use counts half after a while, and few are remembered."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from serve.files import write_whole

log = logging.getLogger(__name__)

HALF_LIFE = 600.0  # seconds
REMEMBERED = 4096


class Popularity:
    """Uses by adapter id. It is worth keeping over a restart, and nothing is lost with it: `save` and `load`."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        # Logarithms to base 2 of the uses, as if all had been in 1970: then a decay is the same for all, and is none.
        self._scores: dict[str, float] = {}

    def used(self, adapter_id: str, times: float = 1.0) -> None:
        """It was asked, or is about to be."""
        now = self._clock() / HALF_LIFE + math.log2(times)
        old = self._scores.get(adapter_id, -math.inf)
        top, low = max(old, now), min(old, now)
        self._scores[adapter_id] = top + math.log2(1 + 2 ** max(low - top, -1000.0))
        if len(self._scores) > 2 * REMEMBERED:
            self._scores = dict(self._top(REMEMBERED))

    def uses(self, adapter_id: str) -> float:
        """How often lately."""
        return float(2 ** max(self._scores.get(adapter_id, -math.inf) - self._clock() / HALF_LIFE, -100.0))

    def ranked(self, adapter_ids: Iterable[str]) -> list[str]:
        """The most popular first; those that are level stay as they came."""
        return sorted(adapter_ids, key=lambda one: -self._scores.get(one, -math.inf))

    def save(self, path: Path) -> None:
        """A disk that is full costs a line in the log."""
        try:
            write_whole(path, json.dumps(dict(self._top(REMEMBERED))).encode())
        except OSError as error:
            log.warning("which adapters are popular was not saved: %s", error)

    def load(self, path: Path) -> None:
        """What `save` wrote, if it did; anything else is as good as nothing."""
        try:
            found = json.loads(path.read_text())
            self._scores = {str(key): float(score) for key, score in found.items() if math.isfinite(score)}
        except (OSError, ValueError, TypeError, AttributeError):
            return

    def _top(self, count: int) -> list[tuple[str, float]]:
        return sorted(self._scores.items(), key=lambda item: -item[1])[:count]
