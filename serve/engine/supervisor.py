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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from serve.adapters.adapter import Adapter
from serve.engine.effect_probe import Logprobs, Probe
from serve.engine.effect_transfer import Effects, Transfer, compared
from serve.engine.engine import Backend, Engine, Phase, Residence
from serve.errors import ConfigError, Conflict, EngineUnavailable, LoradockError
from serve.models.checkpoint import verify
from serve.models.lora_modules import lora_modules

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
# An engine that computes answers between two steps; one that hangs does not.
ASK_SECONDS = 5.0
# Requests that wait for an engine that is coming back, each with its connection.
MAX_WAITING = 512
# The wait before the second restart in a row; each further one waits twice as long.
BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Patience:
    """How long, in seconds, and how often."""

    hang_timeout: float = 300.0  # without a step while requests wait, then the engine counts as dead
    restart_wait: float = 60.0  # that a request waits for an engine that is coming back
    max_restarts: int = 5  # in `restart_window`; one more, and it stays down
    restart_window: float = 600.0
    max_wait: float = 30.0  # that a request is let in for, if it has to wait for its turn
    drain_timeout: float = 600.0  # that answers of an engine that was replaced get to finish


class Adapters(Protocol):
    """What a supervisor asks of whoever keeps the adapters."""

    def wanted(self, base: Supervisor) -> Sequence[Adapter]:
        """Those that get traffic or are pinned, the most important first."""

    async def path(self, adapter: Adapter) -> Path:
        """Where its bytes are, once they are on this machine."""

    def check(self, adapter: Adapter, backend: Backend, modules: Mapping[str, tuple[int, int]]) -> None:
        """AdapterRejected, if a base with these modules cannot run it."""

    async def restore(self, base: Supervisor, engine: Engine) -> None:
        """Bring what is wanted into a fresh engine."""

    def still(self) -> AbstractAsyncContextManager[Any]:
        """While it lasts no adapter changes."""

    def serves(self, base: Supervisor, model: str, by: str) -> None:
        """Remember that this model is the base from now on, also after a restart of the server."""

    def served(self, base: Supervisor) -> str | None:
        """The model that was remembered, if another than the configured one."""


class SwapRefused(Conflict):
    """The new base would change what adapters do; `transfers` says which, and by how much."""

    def __init__(self, message: str, transfers: Sequence[Transfer]) -> None:
        super().__init__(message, code="swap_refused")
        self.transfers = transfers

    def body(self) -> dict[str, Any]:
        body = super().body()
        body["error"]["adapters"] = [one.described() for one in self.transfers]
        return body


@dataclass(frozen=True, slots=True)
class _Ready:
    """An engine that could serve, and what is known of its base."""

    engine: Engine
    modules: Mapping[str, tuple[int, int]]
    probe: Probe | None


class Supervisor:
    """One base model's place in the fleet. `make_probe` gives an engine its effect probe."""

    def __init__(
        self,
        backend: Backend,
        make_probe: Callable[[Engine], Probe | None],
        patience: Patience,
        *,
        tolerance: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Hears of every engine that begins to serve.
        self.on_serve: Callable[[Engine], None] = lambda engine: None
        self.name = backend.name
        self.phase = Phase.STARTING
        # Why it is not ready, when it is not.
        self.reason = ""
        self.restarts = 0
        self.modules: Mapping[str, tuple[int, int]] = {}
        self.probe: Probe | None = None
        self._engine = Engine(backend, patience.max_wait)
        self.configured = backend.model
        # What a swap that is under way does now, and for which model.
        self.swapping: dict[str, str] | None = None
        self._adapters: Adapters | None = None
        self._make_probe = make_probe
        self._tolerance = tolerance
        self._patience = patience
        self._clock = clock
        self._since: float | None = None
        self._start_seconds = 30.0
        self._due = 0.0
        self._deaths: deque[float] = deque()
        self._settled = asyncio.Event()
        self._waiting = 0
        self._changing = asyncio.Lock()
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
        return sum(engine.leases for engine in {self._engine, *self._watching})

    @property
    def background(self) -> int:
        """Those of the leases that no client waits for: of probes, shadows and rehearsals."""
        return sum(engine.background for engine in {self._engine, *self._watching})

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
        """As the engine says itself; while it does not, as it is written in its book."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
                return await self._engine.resident_ids()
        except (TimeoutError, EngineUnavailable):
            return [one.id for one in self.residents if one.loaded]

    # Its own

    async def start(self, adapters: Adapters) -> None:
        """The first engine, watched from now on; its error when it cannot start."""
        self._adapters = adapters
        if remembered := adapters.served(self):
            try:
                swapped = self._fresh(remembered)
                self._serve(await self._bring_up(swapped))
                return
            except ConfigError as error:
                log.error("%s was swapped to %s, which does not start; back to %s: %s", self.name, remembered,
                          self.configured, error)  # fmt: skip
        try:
            self._serve(await self._bring_up(self._engine))
        except BaseException:
            self.phase = Phase.FAILED
            raise

    async def stop(self) -> None:
        self.phase = Phase.STOPPED
        self._settled.set()
        tasks = [*self._watching.values(), *self._draining.values(), *([self._recovering] if self._recovering else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for engine in {self._engine, *self._watching}:
            await engine.stop()

    @property
    def is_available(self) -> bool:
        """A lease would not have to wait."""
        if self.phase is Phase.READY and self.backend.dead:
            self._lost(self._engine, self.backend.cause)
        return self.phase is Phase.READY

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
                pass
            finally:
                self._waiting -= 1
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
            # Of clients; what the server asks by itself is behind all of them, and apart.
            "leases": self.leases - self.background,
            "running": backend.running,
            "background": backend.background,
            "waiting": engine.queue.waiting + backend.waiting,
            "seats": backend.seats,
            "slots": backend.slots,
            "max_resident": backend.max_resident,
            "memory_bytes": backend.memory,
            "restarts": self.restarts,
            "uptime_seconds": round(self.uptime, 1),
            "draining": len([one for one in self._watching if one is not engine]),
            "swapping": self.swapping,
        }

    async def swap(
        self, model: str, *, by: str, force: bool = False, drain_first: bool = False, following: bool = False
    ) -> dict[str, Any]:
        """Put an engine over another model in the place of the one that serves; what was found and how long it took.

        The new one starts beside the old (or after it, with `drain_first`), takes the adapters over and is measured;
        then requests go to it, and the old one ends with its last answer. Whatever fails, the old one goes on.
        `following`, another server has judged and recorded it.
        """
        if self._changing.locked():
            raise Conflict(f"the engine for {self.name} is being replaced already: wait until that is done")
        async with self._changing:
            if not self.is_available:
                raise self.unavailable()
            began = self._clock()
            try:
                verify(model)
                transfers = await self._swap(self._fresh(model), by, force or following, drain_first, not following)
            except ConfigError as error:
                raise Conflict(f"{model} cannot take over, {self.model} goes on: {error}") from error
            finally:
                self.swapping = None
            seconds = round(self._clock() - began, 2)
            log.info("%s is served by %s now, after %.1f s", self.name, model, seconds)
            return {**self.described(), "seconds": seconds, "adapters": [one.described() for one in transfers]}

    async def _swap(self, fresh: Engine, by: str, force: bool, drain_first: bool, record: bool) -> list[Transfer]:
        old = self._engine
        self._step(fresh, "measuring the old")
        before = await self._effects(old, self._keeper.wanted(self))
        if drain_first:
            await self._vacate(old)
        else:
            fresh.backend.check_room()
        try:
            self._step(fresh, "starting")
            ready = await self._bring_up(fresh)
            try:
                self._step(fresh, "measuring the new")
                transfers = await self._transfers(ready, before)
                async with self._keeper.still():
                    # What was pushed or promoted meanwhile.
                    late = [one for one in self._keeper.wanted(self) if one.id not in before]
                    if late and not drain_first:
                        transfers += await self._transfers(ready, await self._effects(old, late))
                    if (bad := [one for one in transfers if one.problem]) and not force:
                        raise SwapRefused(_refusal(fresh.backend.model, bad), transfers)
                    await self._keeper.restore(self, fresh)
                    if record:
                        self._keeper.serves(self, fresh.backend.model, by)
                    self._serve(ready)
            except BaseException:
                await fresh.stop(kill=True)
                raise
        except BaseException:
            if drain_first:
                self._bring_back(old)
            raise
        if not drain_first:
            self._draining[old] = asyncio.create_task(self._see_off(old))
        return transfers

    def _fresh(self, model: str | None = None) -> Engine:
        return Engine(self.backend.another(model), self._patience.max_wait)

    @property
    def _keeper(self) -> Adapters:
        if self._adapters is None:
            raise self.unavailable()
        return self._adapters

    def _step(self, fresh: Engine, step: str) -> None:
        self.swapping = {"model": fresh.backend.model, "step": step}
        log.info("swap of %s to %s: %s", self.name, fresh.backend.model, step)

    async def _effects(self, engine: Engine, adapters: Iterable[Adapter]) -> dict[str, _Measured]:
        effects = Effects(engine)
        found = {}
        for adapter in adapters:
            path = await self._keeper.path(adapter)
            found[adapter.id] = _Measured(adapter, await effects.of(adapter, path))
        return found

    async def _transfers(self, ready: _Ready, before: Mapping[str, _Measured]) -> list[Transfer]:
        """Every adapter that was measured on the old base, on the new one."""
        effects = Effects(ready.engine)
        found = []
        for adapter, was in ((one.adapter, one.effect) for one in before.values()):
            try:
                path = await self._keeper.path(adapter)
                await asyncio.to_thread(self._keeper.check, adapter, ready.engine.backend, ready.modules)
                transfer = compared(adapter.tag, was, await effects.of(adapter, path), self._tolerance)
                if adapter.checks.get("base_model", self.configured) == ready.engine.backend.model:
                    transfer = replace(transfer, problem="")  # it was approved on this one
                found.append(transfer)
            except EngineUnavailable:
                raise
            except LoradockError as error:
                found.append(Transfer(adapter.tag, problem=str(error)))
        return found

    async def _vacate(self, engine: Engine) -> None:
        """Make room before the next engine starts: requests wait, those under way finish, then it ends."""
        self.phase, self.reason = Phase.DRAINING, "its base model is being swapped"
        self._settled.clear()
        self._due = self._clock() + self._start_seconds
        await self._see_off(engine)

    def _bring_back(self, engine: Engine) -> None:
        """The old model again, after a swap that had ended its engine first."""
        self.phase, self.reason = Phase.RESTARTING, "a swap of its base model failed"
        self._recovering = asyncio.create_task(self._recover(engine, self.reason))

    async def _see_off(self, engine: Engine) -> None:
        """End an engine with its last answer; after `drain_timeout` without waiting for that."""
        end = self._clock() + self._patience.drain_timeout
        while engine.leases and engine.phase is Phase.READY and self._clock() < end:
            await asyncio.sleep(POLL_SECONDS)
        # An answer that is cut off tells the engine so a moment after its lease is back.
        await asyncio.sleep(POLL_SECONDS)
        if watch := self._watching.pop(engine, None):
            watch.cancel()
        if engine.leases:
            engine.fail(EngineUnavailable("the base model was replaced while this was answered; ask again"))
        await engine.stop()
        self._draining.pop(engine, None)

    async def _bring_up(self, engine: Engine) -> _Ready:
        """A fresh engine with everything that it should hold; stopped again if that fails."""
        began = self._clock()
        try:
            await engine.start()
            modules = await asyncio.to_thread(lora_modules, engine.backend.model)
            if probe := self._make_probe(engine):
                await probe.start()
            await self._keeper.restore(self, engine)
        except BaseException:
            await engine.stop(kill=True)
            raise
        self._start_seconds = self._clock() - began
        return _Ready(engine, modules, probe)

    def _serve(self, ready: _Ready) -> None:
        """From now on this engine answers."""
        self._engine, self.modules, self.probe = ready.engine, ready.modules, ready.probe
        self._watching[ready.engine] = asyncio.create_task(self._watch(ready.engine))
        self.phase, self.reason, self._since = Phase.READY, "", self._clock()
        self._settled.set()
        self.on_serve(ready.engine)

    async def _watch(self, engine: Engine) -> None:
        """Until the engine dies or hangs."""
        while not (cause := self._cause(engine)):
            await asyncio.sleep(POLL_SECONDS)
        self._lost(engine, cause)

    def _lost(self, engine: Engine, cause: str) -> None:
        """The engine's requests end; and if it served, another takes its place. Once for each engine."""
        if engine not in self._watching or engine.phase is Phase.FAILED:
            return
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
                fresh = self._fresh()
                try:
                    ready = await self._bring_up(fresh)
                except LoradockError as error:
                    cause = self.reason = str(error)
                    log.error("the engine for %s did not come back: %s", self.name, cause)
                    continue
                self._serve(ready)
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


@dataclass(frozen=True, slots=True)
class _Measured:
    adapter: Adapter
    effect: Sequence[Logprobs]


def _refusal(model: str, bad: Sequence[Transfer]) -> str:
    named = "; ".join(f"{one.adapter}: {one.problem}" for one in bad[:5])
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    return (
        f"on {model} these adapters would not do what they do now: {named}{more}; train them for it, or force the swap"
    )
