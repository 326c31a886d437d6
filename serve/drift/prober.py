"""Asks every live version the same fixed prompts, when it came and every hour: a change shows without traffic."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from serve.adapters.registry import Registry
from serve.adapters.store import Store
from serve.drift.monitor import DriftMonitor
from serve.drift.watched_version import Alarm
from serve.engine.effect_probe import FIXED, Logprobs
from serve.engine.engine import LOW_PRIORITY
from serve.engine.fleet import Fleet
from serve.errors import LoradockError

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
# Each prompt shares a step with whoever is answered meanwhile: eight at once made it twice as long.
PAUSE_SECONDS = 0.2


class Prober:
    """Asks the engine of each version's base."""

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        store: Store,
        monitor: DriftMonitor,
        alarmed: Callable[[Alarm], None],
        *,
        interval: float = 3600.0,
        look: float = LOOK_SECONDS,
    ) -> None:
        self._fleet, self._registry, self._store = fleet, registry, store
        self._monitor, self._alarmed = monitor, alarmed
        self._interval, self._look = interval, look
        # When each was probed last, by its engine and the number of its stay there.
        self._probed: dict[tuple[int, int], float] = {}

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
        stays = {
            stay.id: (id(base.engine), stay.number) for base in self._fleet for stay in base.residents if stay.loaded
        }
        self._probed = {stay: when for stay, when in self._probed.items() if stay in stays.values()}
        for name in self._registry.names():
            live, base = self._registry.live(name), self._fleet.of(name)
            if live is None or live.id not in stays or not base.is_available:
                continue
            last = self._probed.get(stays[live.id])
            if last is not None and (not self._interval or now - last < self._interval):
                continue
            self._probed[stays[live.id]] = now
            path = await self._store.bring(live.digest)
            engine = base.engine
            found: list[Logprobs] = []
            for prompt in FIXED:
                if not engine.holds(live.id):
                    break  # it was swapped meanwhile
                async with engine.lease(live.id, path, tenant=live.tenant, priority=LOW_PRIORITY, for_client=False):
                    found += await engine.backend.probe(live.id, [prompt])
                if engine.leases:
                    await asyncio.sleep(PAUSE_SECONDS)
            if len(found) < len(FIXED):
                continue
            noise = base.probe.noise if base.probe else 0.0
            version = f"v{live.version}"
            alarm = await asyncio.to_thread(self._monitor.compare_probe, name, version, live.id, found, noise)
            if alarm:
                await asyncio.to_thread(self._alarmed, alarm)
