"""The supervised engine of one base model: engines come and go, the supervisor stays.

It starts an engine, notices when it dies or hangs, and starts the next one. To everybody else it looks like the engine
that serves now. `base_swap` puts an engine over another model in its place.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from serve.adapters.adapter import Adapter
from serve.engine.backend import Backend
from serve.engine.effect_probe import Probe
from serve.engine.engine import Engine, Phase, Residence
from serve.engine.restarts import Patience, RestartBudget, StartTurn
from serve.errors import ConfigError, Conflict, EngineUnavailable, LoradockError
from serve.models.lora_modules import lora_modules

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
# An engine that computes answers this question between two steps; one that hangs does not.
ASK_SECONDS = 5.0
# Requests that wait for an engine that is coming back, each with its connection.
MAX_WAITING = 512


class Adapters(Protocol):
    """What a supervisor asks of whoever keeps the adapters."""

    def wanted(self, base: Supervisor) -> Sequence[Adapter]:
        """Those that get traffic or are pinned, the most important first."""

    async def path(self, adapter: Adapter) -> Path:
        """Where its bytes are, once they are on this machine."""

    def check(self, adapter: Adapter, backend: Backend, modules: Mapping[str, tuple[int, int]]) -> None:
        """AdapterRejected, if a base with these modules cannot run it."""

    async def restore(self, base: Supervisor, engine: Engine) -> None:
        """Load what is wanted into a fresh engine."""

    def unchanged(self) -> AbstractAsyncContextManager[Any]:
        """While it lasts no adapter changes."""

    async def record_swap(self, base: Supervisor, model: str, by: str) -> None:
        """Remember that this model is the base from now on, also after a restart of the server."""

    async def swapped_model(self, base: Supervisor) -> str | None:
        """The model that was remembered, if another than the configured one."""


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """An engine that could serve, and what is known of its base."""

    engine: Engine
    modules: Mapping[str, tuple[int, int]]
    probe: Probe | None


class Supervisor:
    """One base model. `make_probe` makes an engine's probe; `tolerance` is for swaps, `turn` for starts."""

    def __init__(
        self,
        backend: Backend,
        make_probe: Callable[[Engine], Probe | None],
        patience: Patience,
        *,
        tolerance: float = 0.5,
        engine_of: Callable[[Backend, float], Engine] = Engine,
        modules_of: Callable[[str], Mapping[str, tuple[int, int]]] = lora_modules,
        clock: Callable[[], float] = time.monotonic,
        turn: StartTurn | None = None,
    ) -> None:
        self.name = backend.name
        self.configured = backend.model
        self.tolerance = tolerance
        self.phase, self.restarts = Phase.STARTING, 0
        self.reason = ""  # why it is not ready
        self.modules: Mapping[str, tuple[int, int]] = {}
        self.probe: Probe | None = None
        # What a swap that is under way does now, and for which model.
        self.swapping: dict[str, str] | None = None
        self._engine_of, self._engine = engine_of, engine_of(backend, patience.max_wait)
        self._adapters: Adapters | None = None
        self._make_probe, self._modules_of = make_probe, modules_of
        self._patience = patience
        self._clock = clock
        self._turn = turn or StartTurn()
        self._budget = RestartBudget(patience, clock)
        self._since: float | None = None
        self._start_seconds = 30.0
        # When an engine that is coming back ought to be there, and who waits for it.
        self._due, self._waiting = 0.0, 0
        self._settled, self._served = asyncio.Event(), asyncio.Event()
        # Held while an engine is replaced: by a restart or by a swap, never by both.
        self._replacing = asyncio.Lock()
        self._starting: set[Engine] = set()
        self._watching: dict[Engine, asyncio.Task[None]] = {}
        self._draining: dict[Engine, asyncio.Task[None]] = {}
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
        return sum(engine.leases for engine in self._engines)

    @property
    def background(self) -> int:
        """Those of the leases that no client waits for: of probes, shadows and baselines."""
        return sum(engine.background for engine in self._engines)

    @property
    def residents(self) -> tuple[Residence, ...]:
        return self._engine.residents

    def pin(self, ids: frozenset[str]) -> None:
        """As Engine.pin."""
        self._engine.pin(ids)

    async def ensure(self, adapter_id: str, path: Path) -> None:
        """As Engine.ensure, once there is an engine."""
        await self.available()
        await self._engine.ensure(adapter_id, path)

    async def gone(self, adapter_id: str) -> None:
        """Returns once the adapter's weights are out of every engine here, so that its files may go too."""
        for engine in self._engines:
            await engine.gone(adapter_id)

    def holds(self, adapter_id: str) -> bool:
        return self._engine.holds(adapter_id)

    async def resident_ids(self) -> list[str]:
        """As the engine says itself; while it does not answer, as it was last known here."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
                return await self._engine.resident_ids()
        except (TimeoutError, EngineUnavailable):
            return [resident.id for resident in self.residents if resident.loaded]

    # Its own state

    @property
    def is_ready(self) -> bool:
        return self.phase is Phase.READY and not self.backend.dead

    @property
    def is_available(self) -> bool:
        """A lease would not have to wait."""
        if self.phase is Phase.READY and self.backend.dead:
            self._lost(self._engine, self.backend.cause)
        return self.phase is Phase.READY

    @property
    def uptime(self) -> float:
        """Seconds since the engine that serves now began to."""
        return self._clock() - self._since if self._since is not None and self.phase is Phase.READY else 0.0

    @property
    def adapters(self) -> Adapters:
        if self._adapters is None:
            raise self.unavailable()
        return self._adapters

    @property
    def _engines(self) -> set[Engine]:
        """The one that serves and those that are being drained."""
        return {self._engine, *self._watching}

    def described(self) -> dict[str, Any]:
        """For GET /v1/engines. What the server asks by itself waits behind clients, and is counted apart."""
        engine, backend = self._engine, self.backend
        return {
            "object": "engine",
            "name": self.name,
            "phase": self.phase,
            "reason": self.reason,
            "model": backend.model,
            "weights": backend.weights,
            "leases": self.leases - self.background,
            "running": backend.running,
            "background": backend.background,
            "waiting": engine.queue.waiting + backend.waiting,
            "seats": backend.seats,
            "slots": backend.slots,
            "max_resident": backend.max_resident,
            "memory_bytes": backend.memory,
            **{"restarts": self.restarts, "last_restart": self._budget.last, "uptime_seconds": round(self.uptime, 1)},
            "draining": len(self._watching.keys() - {engine}),
            "swapping": self.swapping,
        }

    async def start(self, adapters: Adapters) -> None:
        """The first engine, watched from now on; its error when it cannot start."""
        self._adapters = adapters
        try:
            if swapped := await adapters.swapped_model(self):
                try:
                    self.serve(await self.bring_up(self.fresh(swapped)))
                    return
                except ConfigError as error:
                    log.error("%s was swapped to %s, which does not start; back to %s: %s", self.name, swapped,
                              self.configured, error)  # fmt: skip
            self.serve(await self.bring_up(self._engine))
        except Exception as error:
            self._give_up(str(error) or type(error).__name__)
            raise

    async def stop(self) -> None:
        self.phase = Phase.STOPPED
        self._settled.set()
        tasks = [*self._watching.values(), *self._draining.values(), *([self._recovering] if self._recovering else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        stops = [engine.stop() for engine in self._engines - self._starting]
        stops += [engine.stop(kill=True) for engine in self._starting]
        for error in await asyncio.gather(*stops, return_exceptions=True):
            if error:
                log.error("an engine for %s did not end", self.name, exc_info=error)

    async def restart(self) -> None:
        """Try again after the supervisor gave up."""
        async with self._replacing:
            if self.phase is Phase.FAILED:
                self._budget.reset()
                self._recover_soon(self._engine, self.reason)

    async def available(self) -> None:
        """Wait for an engine that is coming back; EngineUnavailable when that takes too long or none is coming.

        While one serves, this returns without letting anything else run.
        """
        if not self.is_available and self.phase in (Phase.RESTARTING, Phase.DRAINING):
            if self._waiting >= MAX_WAITING or self._due - self._clock() > self._patience.restart_wait:
                raise self.unavailable()
            self._waiting += 1
            try:
                async with asyncio.timeout(self._patience.restart_wait):
                    await self._settled.wait()
            except TimeoutError:
                pass  # the phase says below what became of it
            finally:
                self._waiting -= 1
        if self.phase is not Phase.READY:
            raise self.unavailable()

    async def replaced(self, engine: Engine) -> None:
        """Returns once another engine than this one serves."""
        while self._engine is engine:
            await self._served.wait()

    def unavailable(self) -> EngineUnavailable:
        why = f" ({self.reason})" if self.reason else ""
        message = f"the engine for {self.name} is {self.phase}{why}"
        if self.phase is Phase.FAILED:
            return EngineUnavailable(f"{message}; an operator must see to it", retry_after=60)
        return EngineUnavailable(f"{message}; retry shortly", retry_after=self._retry_after())

    # For a swap of the base model

    @asynccontextmanager
    async def replacing(self) -> AsyncIterator[None]:
        """While it lasts nobody else replaces the engine; Conflict if somebody does so already."""
        if self._replacing.locked():
            raise Conflict(f"the engine for {self.name} is being replaced already: wait until that is done")
        async with self._replacing:
            if not self.is_available:
                raise self.unavailable()
            try:
                yield
            finally:
                self.swapping = None

    def note_swap(self, model: str, step: str) -> None:
        """How far the swap is that replaces the engine."""
        self.swapping = {"model": model, "step": step}

    def fresh(self, model: str | None = None) -> Engine:
        """An engine with the same options, over the same model or another; not started."""
        return self._engine_of(self.backend.another(model), self._patience.max_wait)

    async def bring_up(self, engine: Engine) -> StartedEngine:
        """Start a fresh engine and load what it should hold; stopped again if that fails. Raises LoradockErrors."""
        began = self._clock()
        self._starting.add(engine)
        try:
            started = await self._started(engine)
        except BaseException as error:
            await engine.stop(kill=True)
            if isinstance(error, Exception) and not isinstance(error, LoradockError):
                log.exception("the engine for %s failed while it started", self.name)
                reason = f"{type(error).__name__}: {error}"
                raise ConfigError(f"the engine for {self.name} cannot start ({reason}): the log says more") from error
            raise
        finally:
            self._starting.discard(engine)
        self._start_seconds = self._clock() - began
        return started

    async def _started(self, engine: Engine) -> StartedEngine:
        reading = asyncio.ensure_future(asyncio.to_thread(self._modules_of, engine.backend.model))  # while it loads
        reading.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, if nobody comes to ask
        async with self._turn.taken(self.name):
            await engine.start()
        if probe := self._make_probe(engine):
            await probe.start()
        await self.adapters.restore(self, engine)
        return StartedEngine(engine, await reading, probe)

    def serve(self, started: StartedEngine) -> None:
        """From now on this engine answers."""
        engine = started.engine
        self._engine = engine
        self.modules = started.modules
        self.probe = started.probe
        self._watching[engine] = asyncio.create_task(self._watch(engine))
        self.phase = Phase.READY
        self.reason = ""
        self._since = self._clock()
        self._settled.set()
        self._served.set()
        self._served = asyncio.Event()

    async def vacate(self, engine: Engine) -> None:
        """Make room for the next engine: new requests wait, those under way finish, then this engine ends."""
        self._unsettle(Phase.DRAINING, "its base model is being swapped")
        await self._drain(engine)

    def drain(self, engine: Engine) -> None:
        """End an engine that was replaced once its last answer is given."""
        self._draining[engine] = asyncio.create_task(self._drain(engine))

    def bring_back(self, engine: Engine) -> None:
        """The old model again, after a swap that had ended its engine first."""
        self._recover_soon(engine, "a swap of its base model failed")

    async def _drain(self, engine: Engine) -> None:
        """End an engine after its last answer, or after `drain_timeout`."""
        end = self._clock() + self._patience.drain_timeout
        while engine.leases and engine.phase is Phase.READY and self._clock() < end:
            await asyncio.sleep(POLL_SECONDS)
        # An answer that is cut off tells the engine so a moment after its lease is back.
        await asyncio.sleep(POLL_SECONDS)
        if watch := self._watching.pop(engine, None):
            watch.cancel()
        if engine.leases:
            engine.fail(EngineUnavailable("the base model was replaced while this was answered; ask again"))
        try:
            await engine.stop()
        finally:
            self._draining.pop(engine, None)

    # Deaths and restarts

    async def _watch(self, engine: Engine) -> None:
        """Until the engine dies or hangs."""
        try:
            while not (cause := self._cause(engine)):
                await asyncio.sleep(POLL_SECONDS)
        except Exception as error:  # an engine that cannot be watched is not left alone
            log.exception("the engine for %s cannot be watched", self.name)
            cause = f"it cannot be watched: {type(error).__name__}: {error}"
        self._lost(engine, cause)

    def _cause(self, engine: Engine) -> str:
        if engine.backend.dead:
            return engine.backend.cause
        if (seconds := engine.backend.stalled) > self._patience.hang_timeout:
            return f"no step for {seconds:.0f} s while requests waited"
        return ""

    def _lost(self, engine: Engine, cause: str) -> None:
        """The engine's requests end; and if it served, another takes its place. Once for each engine."""
        if engine not in self._watching or engine.phase is Phase.FAILED:
            return
        log.error("the engine for %s is gone: %s", self.name, cause)
        if engine is self._engine:
            self._recover_soon(engine, cause)
        engine.fail(EngineUnavailable(f"the engine stopped while answering ({cause})", retry_after=self._retry_after()))

    def _recover_soon(self, engine: Engine, cause: str) -> None:
        self._unsettle(Phase.RESTARTING, cause)
        self._recovering = asyncio.create_task(self._recover(engine, cause))

    async def _recover(self, engine: Engine, cause: str) -> None:
        """Another engine in the place of one that is gone, or FAILED with the reason."""
        async with self._replacing:
            self._watching.pop(engine, None)
            try:
                await engine.stop(kill=True)
                if engine is self._engine:
                    await self._start_another(cause)
            except Exception as error:  # nobody waits for this task: it must not end in between
                log.exception("the engine for %s was not replaced", self.name)
                if engine is self._engine:
                    self._give_up(f"{type(error).__name__}: {error}")

    async def _start_another(self, cause: str) -> None:
        while self._budget.count_death():
            delay = self._budget.delay
            self._due = self._clock() + delay + self._start_seconds
            await asyncio.sleep(delay)
            self.restarts += 1
            self._budget.began(cause)
            try:
                started = await self.bring_up(self.fresh())
            except LoradockError as error:
                cause = self.reason = str(error)
                log.error("the engine for %s did not come back: %s", self.name, cause)
                continue
            self.serve(started)
            log.info("the engine for %s is back after %.1f s", self.name, self._start_seconds)
            return
        window = f"{self._patience.restart_window:.0f} s"
        self._give_up(f"{self._budget.deaths} deaths within {window}, the last: {cause}")

    def _give_up(self, reason: str) -> None:
        self.phase, self.reason = Phase.FAILED, reason
        self._settled.set()
        log.error("the engine for %s stays down: %s", self.name, reason)

    def _unsettle(self, phase: Phase, reason: str) -> None:
        """From now on requests wait for an engine."""
        self.phase, self.reason = phase, reason
        self._settled.clear()
        self._due = self._clock() + self._start_seconds

    def _retry_after(self) -> int:
        """Whole seconds until an engine ought to be there."""
        return min(max(math.ceil(self._due - self._clock()), 1), 60)
