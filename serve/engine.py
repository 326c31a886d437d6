"""One engine: its phase, its leases, and which adapters are resident in it.

The engine knows an adapter by its immutable id, NAME@DIGEST12. A lease keeps an id resident for as long as an answer
takes; a retired id leaves with its last lease.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from prometheus_client.registry import Collector
from starlette.types import ASGIApp

from serve.errors import EngineUnavailable, LoradockError

log = logging.getLogger(__name__)

# An answer that is cut off tells the engine so a moment after its lease is back.
SETTLE = 0.05
# Behind every client: a smaller number goes first.
LOW_PRIORITY = 1 << 30


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"
    FAILED = "failed"


class Backend(Protocol):
    """What an engine needs from whoever computes."""

    name: str
    version: str

    @property
    def max_lora_rank(self) -> int: ...
    @property
    def max_resident(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def app(self) -> ASGIApp: ...
    @property
    def running(self) -> int: ...
    @property
    def dead(self) -> bool: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def add(self, adapter_id: str, number: int, path: Path) -> None: ...
    async def touch(self, adapter_id: str) -> None: ...
    async def remove(self, adapter_id: str) -> None: ...
    async def resident(self) -> set[int]: ...
    async def probe(self, adapter_id: str | None, prompts: Sequence[str]) -> list[dict[int, float]]: ...
    async def score(self, adapter_id: str | None, text: str) -> float: ...
    async def log_stats(self) -> None: ...
    @property
    def collector(self) -> Collector: ...


@dataclass(slots=True)
class Residence:
    """An adapter's stay in the engine, under a number of its own."""

    id: str
    number: int
    path: Path
    leases: int = 0
    retired: bool = False
    loading: asyncio.Task[None] | None = field(default=None, repr=False)
    loaded: bool = False


class Engine:
    """A backend with a phase, and the book of who uses what in it."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.phase = Phase.STARTING
        self.leases = 0
        # In order of last use, oldest first.
        self._residents: dict[str, Residence] = {}
        self._numbers = itertools.count(1)
        self._leaving: set[asyncio.Task[None]] = set()
        # Ids that are never sent away to make room.
        self.pinned: frozenset[str] = frozenset()
        # Ids whose last load failed; one that loads again is forgotten here.
        self._failed: set[str] = set()
        # Hears from where an adapter came and how long it took.
        self.on_load: Callable[[str, float], None] = lambda tier, seconds: None

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def residents(self) -> tuple[Residence, ...]:
        return tuple(self._residents.values())

    @property
    def states(self) -> dict[str, str]:
        """Where each adapter is that is not merely on disk: slot, host, or failed.

        By this book: the engine computes with those in its slots, which the most recently used ones take.
        """
        loaded = [residence.id for residence in self.residents if residence.loaded]
        slots = self.backend.slots
        states = dict.fromkeys(self._failed, "failed")
        return states | {id: "slot" if len(loaded) - place <= slots else "host" for place, id in enumerate(loaded)}

    async def start(self) -> None:
        """Bring the backend up; READY or FAILED afterwards."""
        try:
            await self.backend.start()
        except BaseException:
            self.phase = Phase.FAILED
            raise
        self.phase = Phase.READY

    async def stop(self) -> None:
        self.phase = Phase.STOPPED
        for task in self._leaving:
            task.cancel()
        await self.backend.stop()

    @asynccontextmanager
    async def lease(self, adapter_id: str | None = None, path: Path | None = None) -> AsyncIterator[str]:
        """The name under which the backend answers, held resident until the block ends.

        Nothing is awaited before the lease is counted: whoever looks a version up and leases it in one breath cannot
        lose it to a swap in between.
        """
        self._require_ready()
        self.leases += 1
        resident = self._resident(adapter_id, path) if adapter_id and path else None
        if resident:
            resident.leases += 1
        try:
            if resident:
                await self._loaded(resident)
            yield resident.id if resident else self.name
        finally:
            self.leases -= 1
            if resident:
                resident.leases -= 1
                if resident.retired and not resident.leases:
                    self._see_off(resident)

    async def ensure(self, adapter_id: str, path: Path) -> None:
        """The adapter is resident when this returns; its own error when it cannot be."""
        async with self.lease(adapter_id, path):
            pass

    def retire(self, adapter_id: str) -> None:
        """The adapter leaves the engine as soon as nobody uses it. A new lease calls it back."""
        resident = self._residents.get(adapter_id)
        if resident is None:
            return
        resident.retired = True
        if not resident.leases:
            self._see_off(resident)

    async def gone(self, adapter_id: str) -> None:
        """Returns once the adapter's weights are out of the engine, so that its files may go too."""
        self.retire(adapter_id)
        self._failed.discard(adapter_id)
        while adapter_id in self._residents and self.phase is Phase.READY:
            await asyncio.sleep(SETTLE)

    def holds(self, adapter_id: str) -> bool:
        """The adapter is loaded and stays, by this book: to ask the backend means to wait behind what it computes."""
        resident = self._residents.get(adapter_id)
        return self.phase is Phase.READY and resident is not None and resident.loaded and not resident.retired

    async def resident_ids(self) -> list[str]:
        """Ids whose weights the backend itself says it holds."""
        numbers = await self.backend.resident()
        return [resident.id for resident in self._residents.values() if resident.number in numbers]

    def _require_ready(self) -> None:
        if self.phase is Phase.READY and self.backend.dead:
            self.phase = Phase.FAILED
        if self.phase is not Phase.READY:
            raise EngineUnavailable(f"the engine for {self.name} is {self.phase}; retry shortly")

    def _resident(self, adapter_id: str, path: Path) -> Residence:
        resident = self._residents.pop(adapter_id, None)
        if resident is None:
            resident = Residence(adapter_id, next(self._numbers), path)
        resident.retired = False
        self._make_room()
        self._residents[adapter_id] = resident
        return resident

    def _make_room(self) -> None:
        """Send the longest unused away when one more would not fit the backend's host memory.

        Those in use and those that are pinned stay.
        """
        staying = [resident for resident in self._residents.values() if not resident.retired]
        spare = max(len(staying) + 1 - self.backend.max_resident, 0)
        idle = [resident for resident in staying if not resident.leases and resident.id not in self.pinned]
        for resident in idle[:spare]:
            self.retire(resident.id)

    async def _loaded(self, resident: Residence) -> None:
        """Wait for the one load that everybody who wants this adapter shares; whoever leaves does not stop it."""
        if resident.loaded:
            return
        if resident.loading is None:
            resident.loading = asyncio.create_task(self._load(resident))
        await asyncio.shield(resident.loading)

    async def _load(self, resident: Residence) -> None:
        began = time.perf_counter()
        self._failed.discard(resident.id)
        try:
            if len(self._residents) > self.backend.max_resident:
                await self._refresh_pinned()
            await self.backend.add(resident.id, resident.number, resident.path)
        except BaseException as error:
            self._drop(resident)
            if isinstance(error, LoradockError):
                self._failed.add(resident.id)
            raise
        resident.loaded = True
        self.on_load("disk", time.perf_counter() - began)

    async def _refresh_pinned(self) -> None:
        """More is coming than the backend holds, so it will push out what it used least: let that be none of these."""
        pinned = [one.id for one in self._residents.values() if one.id in self.pinned and one.loaded]
        await asyncio.gather(*(self.backend.touch(adapter_id) for adapter_id in pinned))

    def _see_off(self, resident: Residence) -> None:
        task = asyncio.create_task(self._leave(resident))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, resident: Residence) -> None:
        await asyncio.sleep(SETTLE)
        if resident.leases or not resident.retired or self._residents.get(resident.id) is not resident:
            return
        self._drop(resident)
        try:
            await self.backend.remove(resident.id)
        except EngineUnavailable as error:
            log.warning("%s was not freed: %s", resident.id, error)

    def _drop(self, resident: Residence) -> None:
        if self._residents.get(resident.id) is resident:
            del self._residents[resident.id]
