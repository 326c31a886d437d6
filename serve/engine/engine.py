"""One engine: its phase, its leases, and which adapters are resident in it.

The engine knows an adapter by its immutable id, NAME@DIGEST12. A lease is a seat from its fair queue, and keeps an
id resident for as long as an answer takes; a retired id leaves with its last lease. No more adapters are loaded than
the backend's host memory holds: the least recently used one goes, and comes back under another number.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from serve.asgi.exchange import Watch, count_generated_tokens, count_prompt_tokens, leased, watching
from serve.engine.admission import Admission
from serve.engine.backend import Backend
from serve.engine.dp_ranks import DataParallelRanks
from serve.engine.fair_queue import FairQueue
from serve.engine.payer import Payer, Work
from serve.errors import EngineUnavailable, LoradockError
from serve.names import accounted_name

log = logging.getLogger(__name__)

# An answer that is cut off tells the engine so a moment after its lease is back.
SETTLE = 0.05
# Behind every client: a smaller number goes first.
LOW_PRIORITY = 1 << 30


def engine_priority(priority: int, order: int = 0) -> int:
    """What the backend's own queue goes by: a client's priority or LOW_PRIORITY, then the fair queue's order.

    At most 1 << 62, where vLLM takes up to 1 << 63.
    """
    return (priority << 32) + min(order, (1 << 32) - 1)


class Phase(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Lease:
    """The name under which the backend answers, who pays, and the request's place in its queue, None where it has no
    places. `adapter` is the full name of the adapter, or the base's."""

    engine: Engine = field(repr=False)
    payer: Payer
    model: str
    adapter: str
    priority: int | None
    rank: int | None = None
    # From its seat until the adapter was there.
    load_seconds: float = 0.0

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """While this lasts, what the backend begins is left with `watch`; at its end the payer is charged for it."""
        began, tokens = time.time(), (watching.set(watch), leased.set(self.model))
        try:
            yield
        finally:
            watching.reset(tokens[0])
            leased.reset(tokens[1])
            if generations := watch.read():
                self.engine.account(Work(self.payer, self.adapter, began, generations))


@dataclass(slots=True, eq=False)
class Residence:
    """An adapter's stay in the engine. Each time it is loaded it has a number of its own."""

    id: str
    path: Path
    number: int = 0
    leases: int = 0
    retired: bool = False
    loading: asyncio.Task[None] | None = field(default=None, repr=False)
    loaded: bool = False
    # When its last answer ended, by the event loop's clock.
    idle_since: float = 0.0

    @property
    def taken(self) -> bool:
        """It has a place in the backend's host memory, or is about to."""
        return self.loaded or (self.loading is not None and not self.loading.done())


class Engine:
    """A backend with a phase, and the record of which request uses which adapter in it.

    `on_work` hears of all that was computed, and for whom.
    """

    def __init__(
        self,
        backend: Backend,
        max_wait: float = math.inf,
        on_load: Callable[[str, float], None] = lambda tier, seconds: None,
        on_work: Callable[[Work], None] = lambda work: None,
    ) -> None:
        self._on_work = on_work
        self._max_wait = max_wait
        self.backend = backend
        self.phase = Phase.STARTING
        self.leases = 0
        # Those of them that no client waits for.
        self.background = 0
        # In order of last use, oldest first.
        self._residents: dict[str, Residence] = {}
        self._numbers = itertools.count(1)
        self._leaving: set[asyncio.Task[None]] = set()
        # Of one seat until the backend, once it runs, says how many it has.
        self.queue = FairQueue(1, 1)
        self.ranks = DataParallelRanks(1)
        self._admission = Admission(self.queue, max_wait)
        # Ids that are never sent away to make room.
        self.pinned: frozenset[str] = frozenset()
        # Ids whose last load failed; one that loads again is forgotten here.
        self._failed: set[str] = set()
        # Called after a load: from where the adapter came, and how many seconds it took.
        self._on_load = on_load
        self._failure: EngineUnavailable | None = None
        self._alarms: set[Callable[[EngineUnavailable], None]] = set()

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def residents(self) -> tuple[Residence, ...]:
        return tuple(self._residents.values())

    @property
    def states(self) -> dict[str, str]:
        """Where each adapter is that is not merely on disk: slot, host, or failed.

        As recorded here: the engine computes with those in its slots, which the most recently used ones take.
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
        self.queue = FairQueue(self.backend.seats, self.backend.slots)
        self.ranks = DataParallelRanks(self.backend.ranks)
        self._admission = Admission(self.queue, self._max_wait)
        self.phase = Phase.READY

    async def stop(self, *, kill: bool = False) -> None:
        """End the backend; without waiting for it to agree, with `kill`."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.STOPPED
        for task in self._leaving:
            task.cancel()
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=1)
        await self.backend.stop(kill=kill)

    def fail(self, error: EngineUnavailable) -> None:
        """The backend is gone: whoever waits for it gets `error`, and this engine never touches it again."""
        self.phase, self._failure = Phase.FAILED, error
        for task in (*self._leaving, *(resident.loading for resident in self._residents.values() if resident.loading)):
            task.cancel()
        for alarm in tuple(self._alarms):
            alarm(error)

    def failing(self) -> EngineUnavailable | None:
        """What is wrong with the backend, also before `fail` was called."""
        if self._failure is None and self.backend.dead:
            return EngineUnavailable(f"the engine stopped while answering ({self.backend.cause}); retry shortly")
        return self._failure

    @contextmanager
    def alarm(self, notify: Callable[[EngineUnavailable], None]) -> Iterator[None]:
        """`notify` is called if the engine fails before the block ends; at once if it has failed already."""
        if self._failure:
            notify(self._failure)
        self._alarms.add(notify)
        try:
            yield
        finally:
            self._alarms.discard(notify)

    @asynccontextmanager
    async def lease(
        self,
        adapter_id: str | None = None,
        path: Path | None = None,
        *,
        payer: Payer,
        priority: int = 0,
        opening: str = "",
        sequences: int = 1,
        for_client: bool = True,
    ) -> AsyncIterator[Lease]:
        """A seat in the payer's turn, with the adapter resident until the block ends; one for each of `sequences`.

        `opening` is how its prompt begins.

        Admission learns its forecasts from leases `for_client` alone, which none of LOW_PRIORITY is: a probe holds its
        seat for a moment, the build of a baseline for minutes.

        Nothing is awaited before the lease is counted: between the look-up of a version and its lease no swap can come.
        """
        forecast = self._admission.check(payer.tenant, priority, self.queue.seats_for(sequences))
        for_client = for_client and priority < LOW_PRIORITY
        clock = time.perf_counter  # the loop's counts whole milliseconds: a load began before its request came
        with self._counted(adapter_id, path, background=priority >= LOW_PRIORITY) as resident:
            entered, seated = clock(), 0.0
            id = resident.id if resident else None
            ticket = self.queue.enter(payer.tenant, id, priority=priority, size=sequences)
            try:
                if resident and not resident.loaded and self._has_room():
                    self._begin_loading(resident)
                with self.alarm(ticket.refuse):
                    await ticket.wait()
                seated = clock()
                if for_client:
                    self._admission.seated(forecast, seated - entered)
                if resident:
                    await self._loaded(resident)
                place = engine_priority(priority, ticket.order) if self.backend.prioritizes else None
                with self.ranks.taken(adapter_id, opening) as rank:
                    adapter = accounted_name(id) if id else self.name
                    yield Lease(self, payer, id or self.name, adapter, place, rank, clock() - seated)
            finally:
                self.queue.leave(ticket)
                if seated and for_client:
                    self._admission.left(clock() - seated)

    def account(self, work: Work) -> None:
        """Charge what was computed to whom it was for."""
        tokens = count_prompt_tokens(work.generations) + count_generated_tokens(work.generations)
        if work.payer.meter:
            work.payer.meter.charge(tokens)
        try:
            self._on_work(work)
        except Exception:  # whatever is wrong with the books, the answer is the client's
            log.exception("%d tokens for %s (%s) were not counted", tokens, work.payer.tenant, work.payer.cause)

    async def ensure(self, adapter_id: str, path: Path) -> None:
        """The adapter is resident when this returns; its own error when it cannot be. Takes no seat."""
        with self._counted(adapter_id, path) as resident:
            if resident:
                await self._loaded(resident)

    @contextmanager
    def _counted(
        self, adapter_id: str | None, path: Path | None, *, background: bool = False
    ) -> Iterator[Residence | None]:
        """A lease is counted, and its adapter stays among the residents until the block ends."""
        self._require_ready()
        self.leases += 1
        self.background += background
        resident = self._resident(adapter_id, path) if adapter_id and path else None
        if resident:
            resident.leases += 1
        try:
            yield resident
        finally:
            self.leases -= 1
            self.background -= background
            if resident:
                resident.leases -= 1
                resident.idle_since = asyncio.get_running_loop().time()
                if not resident.leases and not resident.taken:
                    self._drop(resident)
                elif resident.retired and not resident.leases:
                    self._remove_later(resident)

    def pin(self, ids: frozenset[str]) -> None:
        """Never send these away to make room."""
        self.pinned = ids

    def retire(self, adapter_id: str) -> None:
        """The adapter leaves the engine as soon as nobody uses it. A new lease calls it back."""
        resident = self._residents.get(adapter_id)
        if resident is None:
            return
        resident.retired = True
        if not resident.leases:
            self._remove_later(resident)

    async def gone(self, adapter_id: str) -> None:
        """Returns once the adapter's weights are out of the engine, or somebody has called it back meanwhile."""
        self.retire(adapter_id)
        self._failed.discard(adapter_id)
        while self.phase is Phase.READY and (resident := self._residents.get(adapter_id)) and resident.retired:
            await asyncio.sleep(SETTLE)

    def holds(self, adapter_id: str) -> bool:
        """The adapter is loaded and stays, as recorded here: the backend would answer behind what it computes."""
        resident = self._residents.get(adapter_id)
        return self.phase is Phase.READY and resident is not None and resident.loaded and not resident.retired

    async def resident_ids(self) -> list[str]:
        """Ids whose weights the backend itself says it holds."""
        numbers = await self.backend.resident()
        return [resident.id for resident in self._residents.values() if resident.number in numbers]

    def _require_ready(self) -> None:
        if self.phase is not Phase.READY or self.backend.dead:
            raise EngineUnavailable(f"the engine for {self.name} is {self.phase}; retry shortly")

    def _resident(self, adapter_id: str, path: Path) -> Residence:
        resident = self._residents.pop(adapter_id, None) or Residence(adapter_id, path)
        resident.retired = False
        self._residents[adapter_id] = resident
        return resident

    async def _loaded(self, resident: Residence) -> None:
        """Wait for the one load that everybody who wants this adapter shares; whoever leaves does not stop it."""
        while not resident.loaded:
            await asyncio.shield(self._begin_loading(resident))

    def _begin_loading(self, resident: Residence) -> asyncio.Task[None]:
        if resident.loading is None:
            resident.loading = asyncio.create_task(self._load(resident))
            resident.loading.add_done_callback(_retrieve_error)
        return resident.loading

    async def _load(self, resident: Residence) -> None:
        began = time.perf_counter()
        self._failed.discard(resident.id)
        try:
            leaving = await self._make_room(resident)
            if sum(resident.taken for resident in self._residents.values()) > self.backend.max_resident:
                await self._refresh_pinned()
            resident.number = next(self._numbers)
            await self.backend.add(resident.id, resident.number, resident.path)
        except BaseException as error:
            self._drop(resident)
            if isinstance(error, LoradockError):
                self._failed.add(resident.id)
            if isinstance(error, asyncio.CancelledError) and self._failure:
                raise self._failure from None
            raise
        resident.loaded, resident.loading = True, None
        self._on_load("disk", time.perf_counter() - began)
        await asyncio.gather(*leaving)

    def _has_room(self) -> bool:
        """One more may be loaded before it has a seat without pushing out another that is waited for."""
        wanted = sum(resident.taken and resident.leases > 0 for resident in self._residents.values())
        return wanted < self.backend.max_resident

    async def _make_room(self, coming: Residence) -> list[asyncio.Task[None]]:
        """Evict the least recently used, as far as one more would not fit the backend's host memory.

        Those that answer now or are pinned stay; those that are waited for go last, and are loaded again.
        """
        leaving = []
        while self._count_taken(without=coming) >= self.backend.max_resident:
            victim = self._victim()
            if victim is None:
                break
            settle = victim.idle_since + SETTLE - asyncio.get_running_loop().time()
            if settle > 0:
                await asyncio.sleep(settle)
                continue
            victim.loaded = False
            if not victim.leases:
                self._drop(victim)
            # Sent before the load, so that the backend does both between the same two steps.
            leaving.append(asyncio.create_task(self._remove(victim.id)))
        return leaving

    def _victim(self) -> Residence | None:
        active = self.queue.active
        keep = self.pinned | active
        idle = [resident for resident in self._residents.values() if resident.loaded and resident.id not in keep]
        return next((resident for resident in idle if not resident.leases), next(iter(idle), None))

    def _count_taken(self, without: Residence) -> int:
        return sum(resident.taken for resident in self._residents.values() if resident is not without)

    async def _refresh_pinned(self) -> None:
        """More is coming than the backend holds, so it will evict what it used least recently: not these."""
        pinned = [
            resident.id for resident in self._residents.values() if resident.id in self.pinned and resident.loaded
        ]
        await asyncio.gather(*(self.backend.touch(adapter_id) for adapter_id in pinned))

    def _remove_later(self, resident: Residence) -> None:
        task = asyncio.create_task(self._leave(resident))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, resident: Residence) -> None:
        await asyncio.sleep(SETTLE)
        if resident.loading:
            await asyncio.wait([resident.loading])
        if resident.leases or not resident.retired or self._residents.get(resident.id) is not resident:
            return
        self._drop(resident)
        await self._remove(resident.id)

    async def _remove(self, adapter_id: str) -> None:
        try:
            await self.backend.remove(adapter_id)
        except EngineUnavailable as error:
            log.warning("%s was not freed: %s", adapter_id, error)

    def _drop(self, resident: Residence) -> None:
        if self._residents.get(resident.id) is resident:
            del self._residents[resident.id]


def _retrieve_error(task: asyncio.Task[None]) -> None:
    """Whoever began a load may be gone when it fails; whoever still waits for it gets the error."""
    if not task.cancelled():
        task.exception()
