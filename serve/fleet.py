"""The live engines: one supervisor for each base model, and all of them by name.

A supervisor stays while engines come and go under it. It starts one, notices when it dies or hangs, starts the next,
and puts one over another model in its place while traffic flows. To everybody else it looks like the engine that
serves now.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.base import lora_modules
from serve.engine import Backend, Engine, Phase, Residence
from serve.errors import ConfigError, EngineUnavailable, LoradockError, NotFound
from serve.probe import Probe

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
# The wait before the second restart in a row; each further one waits twice as long.
BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long, in seconds, and how often."""

    hang_timeout: float = 60.0  # without a step while requests wait, then the engine counts as dead
    restart_wait: float = 60.0  # that a request waits for an engine that is coming back
    max_restarts: int = 5  # in `restart_window`; one more, and it stays down
    restart_window: float = 600.0
    drain_timeout: float = 600.0  # that answers of an engine that was replaced get to finish


class Supervisor:
    """One base model's place in the fleet.

    `restore` brings the adapters that ought to be there into a fresh engine; `make_probe` gives it its effect probe.
    """

    def __init__(
        self,
        backend: Backend,
        restore: Callable[[Supervisor, Engine], Awaitable[None]],
        make_probe: Callable[[Engine], Probe | None],
        patience: Patience,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = backend.name
        self.phase = Phase.STARTING
        # Why it is not ready, when it is not.
        self.reason = ""
        self.restarts = 0
        self.modules: Mapping[str, tuple[int, int]] = {}
        self.probe: Probe | None = None
        self._engine = Engine(backend)
        self._restore = restore
        self._make_probe = make_probe
        self._patience = patience
        self._clock = clock
        self._since: float | None = None
        self._start_seconds = 30.0
        self._due = 0.0
        self._deaths: deque[float] = deque()
        self._settled = asyncio.Event()
        self._changing = asyncio.Lock()
        self._watching: dict[Engine, asyncio.Task[None]] = {}
        self._recovering: asyncio.Task[None] | None = None

    # As the engine that serves now

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def backend(self) -> Backend:
        return self._engine.backend

    @property
    def model(self) -> str:
        return self.backend.model

    @property
    def leases(self) -> int:
        """Answers under way, those of engines that are being drained too."""
        return sum(engine.leases for engine in {self._engine, *self._watching})

    @property
    def residents(self) -> tuple[Residence, ...]:
        return self._engine.residents

    @property
    def states(self) -> dict[str, str]:
        return self._engine.states

    @property
    def pinned(self) -> frozenset[str]:
        return self._engine.pinned

    @pinned.setter
    def pinned(self, ids: frozenset[str]) -> None:
        self._engine.pinned = ids

    @property
    def is_ready(self) -> bool:
        return self.phase is Phase.READY and not self.backend.dead

    @property
    def uptime(self) -> float:
        """Seconds since the engine that serves now began to."""
        return self._clock() - self._since if self._since is not None and self.phase is Phase.READY else 0.0

    async def ensure(self, adapter_id: str, path: Path) -> None:
        """As Engine.ensure, once there is an engine."""
        await self.available()
        await self._engine.ensure(adapter_id, path)

    def retire(self, adapter_id: str) -> None:
        self._engine.retire(adapter_id)

    async def gone(self, adapter_id: str) -> None:
        """Returns once the adapter's weights are out of every engine here, so that its files may go too."""
        for engine in {self._engine, *self._watching}:
            await engine.gone(adapter_id)

    def holds(self, adapter_id: str) -> bool:
        return self._engine.holds(adapter_id)

    async def resident_ids(self) -> list[str]:
        return await self._engine.resident_ids()

    # Its own

    async def start(self) -> None:
        """The first engine, watched from now on; its error when it cannot start."""
        try:
            await self._bring_up(self._engine)
        except BaseException:
            self.phase = Phase.FAILED
            raise
        self._serve(self._engine)

    async def stop(self) -> None:
        self.phase = Phase.STOPPED
        self._settled.set()
        tasks = [*self._watching.values(), *([self._recovering] if self._recovering else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in {self._engine, *self._watching}:
            await engine.stop()

    @property
    def is_available(self) -> bool:
        """A lease would not have to wait."""
        return self.phase is Phase.READY

    async def available(self) -> None:
        """Wait for an engine that is coming back; EngineUnavailable when that takes too long or none is coming.

        While one serves, this returns without letting anything else run.
        """
        if self.phase in (Phase.RESTARTING, Phase.DRAINING):
            try:
                await asyncio.wait_for(self._settled.wait(), self._patience.restart_wait)
            except TimeoutError:
                pass
        if self.phase is not Phase.READY:
            raise self.unavailable()

    def unavailable(self) -> EngineUnavailable:
        why = f" ({self.reason})" if self.reason else ""
        said = f"the engine for {self.name} is {self.phase}{why}"
        if self.phase is Phase.FAILED:
            return EngineUnavailable(f"{said}; an operator must see to it", retry_after=60)
        return EngineUnavailable(f"{said}; retry shortly", retry_after=self._retry_after())

    async def restart(self) -> None:
        """Try again after the supervisor gave up."""
        async with self._changing:
            if self.phase is Phase.FAILED:
                self._deaths.clear()
                self._recovering = asyncio.create_task(self._recover(self._engine, self.reason))

    def described(self) -> dict[str, Any]:
        """For GET /v1/engines."""
        engine, backend = self._engine, self.backend
        return {
            "object": "engine",
            "name": self.name,
            "phase": self.phase,
            "reason": self.reason,
            "model": backend.model,
            "leases": self.leases,
            "running": backend.running,
            "waiting": engine.line.waiting + backend.waiting,
            "seats": backend.seats,
            "slots": backend.slots,
            "max_resident": backend.max_resident,
            "memory_bytes": backend.memory,
            "restarts": self.restarts,
            "uptime_seconds": round(self.uptime, 1),
            "draining": len([one for one in self._watching if one is not engine]),
        }

    async def _bring_up(self, engine: Engine) -> None:
        """A fresh engine with everything that it should hold; stopped again if that fails."""
        began = self._clock()
        try:
            await engine.start()
            self.modules = await asyncio.to_thread(lora_modules, engine.backend.model)
            self.probe = self._make_probe(engine)
            if self.probe:
                await self.probe.start()
            await self._restore(self, engine)
        except BaseException:
            await engine.stop(kill=True)
            raise
        self._start_seconds = self._clock() - began

    def _serve(self, engine: Engine) -> None:
        """From now on this engine answers."""
        self._engine = engine
        self._watching[engine] = asyncio.create_task(self._watch(engine))
        self.phase, self.reason, self._since = Phase.READY, "", self._clock()
        self._settled.set()

    async def _watch(self, engine: Engine) -> None:
        """Until the engine dies or hangs; then its requests end, and if it served, another takes its place."""
        while not (cause := self._cause(engine)):
            await asyncio.sleep(POLL_SECONDS)
        log.error("the engine for %s is gone: %s", self.name, cause)
        if engine is self._engine:
            self.phase, self.reason = Phase.RESTARTING, cause
            self._settled.clear()
            self._due = self._clock() + self._start_seconds
            self._recovering = asyncio.create_task(self._recover(engine, cause))
        engine.fail(EngineUnavailable(f"the engine stopped while answering ({cause})", retry_after=self._retry_after()))

    def _cause(self, engine: Engine) -> str:
        if engine.backend.dead:
            return engine.backend.cause
        if (seconds := engine.backend.stalled) > self._patience.hang_timeout:
            return f"no step for {seconds:.0f} s while requests waited"
        return ""

    async def _recover(self, engine: Engine, cause: str) -> None:
        """Another engine in the place of one that is gone, or FAILED with the reason."""
        async with self._changing:
            self._watching.pop(engine, None)
            await engine.stop(kill=True)
            if engine is not self._engine:
                return
            while not self._given_up(cause):
                delay = self._backoff()
                self._due = self._clock() + delay + self._start_seconds
                await asyncio.sleep(delay)
                self.restarts += 1
                fresh = Engine(engine.backend.another())
                try:
                    await self._bring_up(fresh)
                except LoradockError as error:
                    cause = self.reason = str(error)
                    log.error("the engine for %s did not come back: %s", self.name, cause)
                    continue
                self._serve(fresh)
                log.info("the engine for %s is back after %.1f s", self.name, self._start_seconds)
                return

    def _given_up(self, cause: str) -> bool:
        """Count one more death; whether that was one too many."""
        now = self._clock()
        self._deaths.append(now)
        while self._deaths and self._deaths[0] < now - self._patience.restart_window:
            self._deaths.popleft()
        if len(self._deaths) <= self._patience.max_restarts:
            return False
        window = f"{self._patience.restart_window:.0f} s"
        self.reason = f"{len(self._deaths)} deaths within {window}, the last: {cause}"
        self.phase = Phase.FAILED
        self._settled.set()
        log.error("the engine for %s stays down: %s", self.name, self.reason)
        return True

    def _backoff(self) -> float:
        """None before the first restart."""
        return (
            0.0 if len(self._deaths) < 2 else min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (len(self._deaths) - 2))
        )

    def _retry_after(self) -> int:
        """Whole seconds until an engine ought to be there."""
        return min(max(math.ceil(self._due - self._clock()), 1), 60)


class Fleet:
    """The supervisors by their base model's name; the first one is who answers a request that names none.

    `base_of` says which base an adapter belongs to, by its full name; None is the first.
    """

    def __init__(
        self, supervisors: Iterable[Supervisor], base_of: Callable[[str], str | None] = lambda name: None
    ) -> None:
        self._all = {one.name: one for one in supervisors}
        self._base_of = base_of
        if not self._all:
            raise ConfigError("a server needs a model: give one as MODEL")

    @property
    def first(self) -> Supervisor:
        return next(iter(self._all.values()))

    def __iter__(self) -> Iterator[Supervisor]:
        return iter(self._all.values())

    def __contains__(self, name: object) -> bool:
        return name in self._all

    def get(self, name: str | None) -> Supervisor:
        """The base of that name; the first for None."""
        if name is None:
            return self.first
        if name not in self._all:
            raise NotFound(f"there is no engine {name!r} here: GET /v1/engines lists them", param="engine")
        return self._all[name]

    def of(self, adapter: str) -> Supervisor:
        """Whose engine answers for an adapter."""
        return self.get(self._base_of(adapter))

    @property
    def is_ready(self) -> bool:
        return all(one.is_ready for one in self)

    async def start(self) -> None:
        """Every engine, one after the other: two that start at once fight for the same memory and cores."""
        for one in self:
            await one.start()

    async def stop(self) -> None:
        await asyncio.gather(*(one.stop() for one in self))
