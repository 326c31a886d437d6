"""Asks every live version the same fixed prompts, once it is loaded and every hour: a change shows without traffic.

Where more versions are asked than an engine holds each comes and goes by the minute: one that comes back is asked when
its hour is over, as one that stayed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

from serve.adapters.adapter import Adapter
from serve.adapters.registry.registry import Registry
from serve.adapters.store import Store
from serve.drift.monitor import DriftMonitor
from serve.drift.probe_comparison import ProbeAnswers
from serve.engine.effect_probe import FIXED, Logprobs, measuring
from serve.engine.engine import LOW_PRIORITY, Engine
from serve.engine.fleet import Fleet
from serve.engine.supervisor import Supervisor
from serve.errors import LoradockError
from serve.events import Events

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
# Each prompt shares a step with clients' requests: eight at once made that step twice as long.
PAUSE_SECONDS = 0.2
# First answers, and answers that moved, are asked for again when the engine is idle, or after so long at the latest.
CONFIRM_SECONDS = 300.0


@dataclass(slots=True)
class _Probed:
    """When an engine was asked a version last; its answers if they are asked for again, which are kept while it stays
    there, and whether they still are if it left."""

    when: float
    to_confirm: ProbeAnswers | None = field(default=None, repr=False)
    left_unconfirmed: bool = False


class Prober:
    """Asks the engine of each version's base."""

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        store: Store,
        monitor: DriftMonitor,
        events: Events,
        *,
        interval: float = 3600.0,
        look: float = LOOK_SECONDS,
    ) -> None:
        self._fleet = fleet
        self._registry = registry
        self._store = store
        self._monitor, self._events = monitor, events
        self._interval, self._look = interval, look
        # By engine and version.
        self._probed: WeakKeyDictionary[Engine, dict[str, _Probed]] = WeakKeyDictionary()
        # What each engine's base answered.
        self._base_answers: WeakKeyDictionary[Engine, list[Logprobs]] = WeakKeyDictionary()

    async def run(self) -> None:
        """Probe what is due, for ever."""
        while True:
            await asyncio.sleep(self._look)
            await self.round()

    async def round(self) -> None:
        """Probe every live version that is in the engine and due; one that cannot be probed stops no other."""
        there = {base.engine: {each.id for each in base.residents if each.loaded} for base in self._fleet}
        live = {name: version for name in self._registry.names() if (version := self._registry.live(name))}
        self._forget(there, {version.id for version in live.values()})
        for name, version in live.items():
            base = self._fleet.owner(name)
            if base is None or not base.is_available or version.id not in there.get(base.engine, ()):
                continue
            if not self._is_due(version.id, base.engine):
                continue
            try:
                await self._probe(version, base)
            except LoradockError as error:
                log.warning("%s was not probed: %s", version.tag, error)

    def _forget(self, there: Mapping[Engine, set[str]], live: set[str]) -> None:
        """Versions that are not live any more; of those that left an engine their answers, and without an interval
        when they were asked."""
        for engine, held in there.items():
            probed = self._probed.setdefault(engine, {})
            for id in [id for id in probed if id not in live or not (self._interval or id in held)]:
                del probed[id]
            for id in probed.keys() - held:
                if probed[id].to_confirm is not None:
                    probed[id] = _Probed(probed[id].when, left_unconfirmed=True)

    def _is_due(self, id: str, engine: Engine) -> bool:
        probed = self._probed.get(engine, {}).get(id)
        if probed is None:
            return True
        waited, idle = time.monotonic() - probed.when, not engine.leases
        if probed.to_confirm is not None:
            return idle or waited >= CONFIRM_SECONDS
        return (probed.left_unconfirmed and idle) or bool(self._interval and waited >= self._interval)

    async def _probe(self, live: Adapter, base: Supervisor) -> None:
        every = self._probed.setdefault(base.engine, {})
        before = every.get(live.id)
        probed = every[live.id] = _Probed(time.monotonic(), before.to_confirm if before else None)
        while answers := await self._ask(live, base):
            names = (live.name, f"v{live.version}", live.id)
            result = await asyncio.to_thread(self._monitor.compare_probe, *names, answers, earlier=probed.to_confirm)
            probed.to_confirm = answers if result.ask_again else None
            if result.alarm:
                self._events.publish(result.alarm)
            if not result.ask_again or base.engine.leases:  # then `_is_due` says when
                return

    async def _ask(self, live: Adapter, base: Supervisor) -> ProbeAnswers | None:
        """The answers; None if the version leaves the engine meanwhile, or does not answer."""
        path = await self._store.bring(live.digest)
        engine, noise = base.engine, base.probe.noise if base.probe else 0.0
        if engine not in self._base_answers and (answers := await self._ask_engine(engine, None, None)):
            self._base_answers[engine] = answers
        version = await self._ask_engine(engine, live.id, path)
        if version is None or engine not in self._base_answers:
            return None
        return ProbeAnswers(version, self._base_answers[engine], noise)

    async def _ask_engine(self, engine: Engine, adapter_id: str | None, path: Path | None) -> list[Logprobs] | None:
        answers: list[Logprobs] = []
        for prompt in FIXED:
            if adapter_id is not None and not engine.holds(adapter_id):
                return None
            async with measuring(engine, adapter_id, path, priority=LOW_PRIORITY) as backend:
                answers += await backend.probe(adapter_id, [prompt])
            if engine.leases:
                await asyncio.sleep(PAUSE_SECONDS)
        return answers if len(answers) == len(FIXED) and all(answers) else None
