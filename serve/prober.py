"""Asks every live version the same fixed prompts, when it came and every hour: a change shows without traffic."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from serve.engine import Engine, Phase
from serve.errors import LoradockError
from serve.probe import FIXED, Logprobs
from serve.registry import Registry
from serve.store import Store
from serve.watcher import Alarm, Watcher

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
# At a time, behind every client: a probe may not hold anybody up for long.
BATCH = 8


class Prober:
    """`noise` is what the engine's answers differ by from themselves, in nats."""

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        store: Store,
        watcher: Watcher,
        alarmed: Callable[[Alarm], None],
        noise: Callable[[], float],
        *,
        interval: float = 3600.0,
        look: float = LOOK_SECONDS,
    ) -> None:
        self._engine, self._registry, self._store = engine, registry, store
        self._watcher, self._alarmed, self._noise = watcher, alarmed, noise
        self._interval, self._look = interval, look
        # When each was probed last, by the number of its stay in the engine.
        self._probed: dict[int, float] = {}

    async def run(self) -> None:
        """Probe what is due, for ever."""
        while True:
            await asyncio.sleep(self._look)
            try:
                await self.round()
            except LoradockError as error:
                log.warning("the probe of the live versions broke off: %s", error)

    async def round(self) -> None:
        """Probe every live version that is in the engine and due."""
        now = time.monotonic()
        stays = {stay.id: stay.number for stay in self._engine.residents if stay.loaded}
        self._probed = {number: when for number, when in self._probed.items() if number in stays.values()}
        for name in self._registry.names():
            live = self._registry.live(name)
            if live is None or live.id not in stays or self._engine.phase is not Phase.READY:
                continue
            last = self._probed.get(stays[live.id])
            if last is not None and (not self._interval or now - last < self._interval):
                continue
            self._probed[stays[live.id]] = now
            found: list[Logprobs] = []
            async with self._engine.lease(live.id, self._store.path(live.digest)):
                for start in range(0, len(FIXED), BATCH):
                    found += await self._engine.backend.probe(live.id, FIXED[start : start + BATCH])
            version = f"v{live.version}"
            alarm = await asyncio.to_thread(self._watcher.probed, name, version, live.id, found, self._noise())
            if alarm:
                self._alarmed(alarm)
