"""Which adapters are asked most, lately, and how those that were pushed out come back.

A use counts half after a while, and few adapters are remembered.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from serve.adapters.adapter import Adapter
from serve.engine.fleet import Fleet
from serve.engine.supervisor import Adapters, Supervisor
from serve.errors import LoradockError
from serve.files import write_whole

log = logging.getLogger(__name__)

HALF_LIFE = 600.0  # seconds
REMEMBERED = 4096
# Seconds between two looks at what ought to be in an engine's memory, and between two notes of what is popular.
PREFETCH_SECONDS, SAVE_SECONDS = 1.0, 60.0


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
        return sorted(adapter_ids, key=lambda adapter_id: -self._scores.get(adapter_id, -math.inf))

    def save(self, path: Path) -> None:
        """A disk that is full costs a line in the log."""
        try:
            write_whole(path, json.dumps(dict(self._top(REMEMBERED))).encode())
        except OSError as error:
            log.warning("which adapters are popular was not saved: %s", error)

    def load(self, path: Path) -> None:
        """What `save` wrote, if it did; anything else is as good as nothing."""
        try:
            saved = json.loads(path.read_text())
            self._scores = {str(key): float(score) for key, score in saved.items() if math.isfinite(score)}
        except (OSError, ValueError, TypeError, AttributeError):
            return

    def _top(self, count: int) -> list[tuple[str, float]]:
        return sorted(self._scores.items(), key=lambda item: -item[1])[:count]


class Prefetcher:
    """Loads popular adapters before somebody asks for them; `notes` is where popularity outlives a restart."""

    def __init__(self, fleet: Fleet, adapters: Adapters, popularity: Popularity, notes: Path) -> None:
        self._fleet = fleet
        self._adapters = adapters
        self._popularity = popularity
        self._notes = notes

    async def run(self) -> None:
        """Until cancelled: bring popular adapters back that were pushed out, and save which are popular."""
        turns = round(SAVE_SECONDS / PREFETCH_SECONDS)
        for turn in itertools.count(1):
            await asyncio.sleep(PREFETCH_SECONDS)
            for base in self._fleet:
                with suppress(LoradockError):  # whoever asks for that adapter hears of it
                    await self.prefetch(base)
            if turn % turns == 0:
                await self.save()

    async def prefetch(self, base: Supervisor) -> Adapter | None:
        """Load the most popular adapter that takes traffic and was pushed out, if nobody waits for the engine.

        As many places as a batch has slots are left to whoever comes.
        """
        if not base.is_ready or base.engine.queue.waiting:
            return None
        places = max(base.backend.max_resident - base.backend.slots, 1)
        for adapter in self._adapters.wanted(base)[:places]:
            if self._popularity.uses(adapter.id) > 1 and not base.holds(adapter.id):
                await base.ensure(adapter.id, await self._adapters.path(adapter))
                return adapter
        return None

    async def load(self) -> None:
        await asyncio.to_thread(self._popularity.load, self._notes)

    async def save(self) -> None:
        await asyncio.to_thread(self._popularity.save, self._notes)
