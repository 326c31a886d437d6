"""What happens to an adapter from upload to removal: every change in one place.

push:      inspect > store > load > probe > share the bytes > register > flip the pointer > retire the old version
remove:    forget > wait for its last answer > free the engine > free the disk

Only from `register` on does a change of the same adapter wait for another: see `change_locks`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from serve.adapters.adapter import CONFIG, WEIGHTS, Adapter, Inspection, Limits, check_digest
from serve.adapters.added_tokens import check_added, keep_added
from serve.adapters.file_thread import in_turn
from serve.adapters.inspection import inspect
from serve.adapters.provenance import kept
from serve.adapters.registry.registry import Registry
from serve.adapters.registry.snapshot import Share
from serve.adapters.store import Store
from serve.adapters.upload import GGUF_FILE
from serve.auth.rate_limits import UNLIMITED
from serve.auth.rate_limits import Limits as KeyLimits
from serve.engine.effect_probe import ANY_EFFECT
from serve.engine.fleet import Fleet
from serve.engine.supervisor import Supervisor
from serve.errors import AdapterRejected, ConfigError, Conflict, EngineUnavailable, LoradockError, OutOfSpace
from serve.events import Events, Promoted, RolledBack, Unloaded, VersionAdded
from serve.models.checkpoint import folder_of, is_another_model
from serve.names import check_adapter_name, has_part, shown
from serve.rollout.base_adapters import BaseAdapters
from serve.rollout.candidate import Candidate
from serve.rollout.change_locks import ChangeLocks
from serve.rollout.converted import as_lora, measured
from serve.rollout.prefetch import Popularity
from serve.rollout.quotas import check_pin, check_push
from serve.rollout.traffic import Traffic

log = logging.getLogger(__name__)
T = TypeVar("T")

# A version that takes over the traffic counts as used so often, at once.
PROMOTED = 8.0
# A rollback is done once the registry has it; so long it waits for the version to be loaded too.
WARM_SECONDS = 2.0
# So long a rollback waits for the registry before it holds on this server alone; and how often it is tried to write
# such a one down.
REGISTRY_SECONDS, WRITE_DOWN_SECONDS = 2.0, 0.5
# So long the first engine waits for the shared folder's sweep, and the end of the server for what is not done yet.
SWEEP_SECONDS, SETTLE_SECONDS = 5.0, 5.0
# Between two looks for bytes that are at home on other servers, and how long those were not loaded then.
EVICT_SECONDS, UNUSED_SECONDS = 3600.0, 86_400.0


class Lifecycle:
    """Changes to adapters. `limits` says what an upload for a base may be.

    A change may say which version it `expected` to be live (0: none): Conflict, if another one is.
    """

    def __init__(
        self,
        fleet: Fleet,
        registry: Registry,
        store: Store,
        limits: Callable[[Supervisor], Limits],
        popularity: Popularity,
        events: Events,
        is_home: Callable[[str, int], bool] = lambda name, rank: True,
    ) -> None:
        # Whether an adapter of this name and rank is at home on this server.
        self._is_home = is_home
        self.fleet = fleet
        self.registry = registry
        self.store = store
        self.popularity = popularity
        self._traffic = Traffic(registry, fleet, popularity)
        self._limits = limits
        self._events = events
        # Reads and answers take none of these.
        self._locks = ChangeLocks()
        self.adapters = BaseAdapters(self._traffic, registry, store, self._locks, events)
        self._aside: set[asyncio.Task[None]] = set()
        # Which versions serve, by name, as of the last change that reached the engines; and all as of the last look.
        self._adopted: dict[str, dict[str, Adapter]] = {name: self._traffic.of(name) for name in registry.names()}
        self._seen = registry.frozen()

    async def sweep(self) -> None:
        """Before the first engine starts: remove what no version names."""
        digests = self.registry.digests()
        await asyncio.to_thread(self.store.sweep, digests)
        await asyncio.wait([self._start(self._sweep_shared(digests))], timeout=SWEEP_SECONDS)

    async def _sweep_shared(self, digests: set[str]) -> None:
        try:
            await self.store.sweep_shared(digests)
        except LoradockError as error:
            log.warning("what nobody names any more stays where all servers see it: %s", error)

    async def push(
        self,
        name: str,
        folder: Path,
        *,
        by: str,
        promote: bool,
        why: str = "",
        shared: bool | None = None,
        quota: KeyLimits = UNLIMITED,
        engine: str | None = None,
        expected: int | None = None,
        min_effect: float | None = None,
        conversion_error: float | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> tuple[Adapter, bool]:
        """Admit the PEFT adapter in `folder` as a version of `name`; whether it is new. An error changes nothing.

        `min_effect` is what the probe asks of it, in the place of the configured one, and `conversion_error` what
        making it a LoRA may leave out. `notes` are kept with its checks.
        """
        async with self._received(name, folder, engine, expected, quota, min_effect, conversion_error) as new:
            base = new.base
            inspection = new.inspection
            judged = new.model
            own = None if base is self.fleet.first else base.name
            check = partial(check_push, name=name, digest=new.digest, nbytes=inspection.nbytes, quota=quota)
            add = partial(
                self.registry.add, name, digest=new.digest, check=check, by=by, promote=promote, why=why,
                shared=shared, base=own, expected=expected,
            )  # fmt: skip
            while True:
                checks = {**await self._judge(new, inspection, min_effect), **(notes or {})}
                await self.store.upload(new.digest)
                async with self._change(name, base):
                    if base.model == judged:
                        live = self._live(name)
                        adapter, created = await asyncio.to_thread(add, inspection=inspection, checks=checks)
                        break
                # The base was swapped meanwhile: what counts is what the adapter does on the one that serves now.
                judged = base.model
                inspection = await in_turn(inspect, new.path, base.modules, new.limits)
        if adapter.id not in self._traffic.of(name):
            base.engine.retire(adapter.id)
        if created:
            self._events.publish(VersionAdded(name, adapter.version, by))
        if promote and live != adapter.version:
            self._events.publish(Promoted(name, adapter.version, by))
        return adapter, created

    async def try_push(
        self,
        name: str,
        folder: Path,
        *,
        quota: KeyLimits = UNLIMITED,
        engine: str | None = None,
        expected: int | None = None,
        min_effect: float | None = None,
        conversion_error: float | None = None,
    ) -> tuple[Candidate, dict[str, Any]]:
        """Every check of `push`, with what the probe measured, or its error; nothing of the adapter stays."""
        async with self._received(name, folder, engine, expected, quota, min_effect, conversion_error) as new:
            checks = await self._judge(new, new.inspection, min_effect)
        if new.id not in self._traffic.of(name):
            new.base.engine.retire(new.id)
        self._let_go(new.base, new.id, new.digest)
        return new, checks

    @asynccontextmanager
    async def _received(
        self,
        name: str,
        folder: Path,
        engine: str | None,
        expected: int | None,
        quota: KeyLimits,
        min_effect: float | None,
        conversion_error: float | None,
    ) -> AsyncIterator[Candidate]:
        """What came with a push, inspected; its bytes are kept until the block ends, and let go if that fails."""
        check_adapter_name(name, [base.name for base in self.fleet])
        base = self._base(name, engine)
        await base.available()
        limits = replace(self._limits(base), may_change_nothing=min_effect == ANY_EFFECT)
        if conversion_error is not None:
            limits = replace(limits, conversion_error=conversion_error)
        model = base.model
        await in_turn(_as_peft, folder, model)
        async with as_lora(self.store, name, folder, base.modules, limits) as (plain, conversion):
            warning = await in_turn(keep_added, folder, plain, base.backend.tokens)
            inspection = await in_turn(inspect, plain, base.modules, limits)
            await in_turn(check_added, plain, base.backend.tokens)
            await self._expect(name, expected)
            digest = await asyncio.to_thread(self.store.admit, plain, keep=True)
            adapter_id = f"{name}@{digest[:12]}"
            try:
                check_push(self.registry.adapters(), name=name, digest=digest, nbytes=inspection.nbytes, quota=quota)
                check_digest(digest, limits)
                path = self.store.path(digest)
                yield Candidate(base, model, limits, inspection, digest, adapter_id, path, conversion, warning)
            except BaseException:
                self._let_go(base, adapter_id, digest)
                raise
            finally:
                self.store.release(digest)

    async def _judge(self, new: Candidate, inspection: Inspection, min_effect: float | None) -> dict[str, Any]:
        """Load an adapter and see what it does; the checks that the registry keeps."""
        base = new.base
        model = base.model
        await base.ensure(new.id, new.path)
        classifies = bool(inspection.labels)
        judged = base.probe.judge(new.id, new.path, min_effect, classifies=classifies) if base.probe else None
        checks = await judged if judged is not None else {}
        stated = inspection.base or ""
        if new.warning:
            checks["warning"] = new.warning
        if await asyncio.to_thread(is_another_model, stated, model, base.name):
            checks["warning"] = (
                f"it says that it was trained on {shown(stated)}; its shapes fit {base.name}, which seems to "
                "be another model: is it the right base?"
            )
        if new.conversion:
            checks["conversion"] = await measured(new)
        return {**checks, **kept(inspection), "base_model": model}

    async def promote(self, name: str, version: int, *, by: str, expected: int | None = None, why: str = "") -> Adapter:
        """Make a version live: requests from now on answer from it, those under way finish where they began."""
        await self._expect(name, expected)
        await self._load(self.registry.get(name, version))
        async with self._change(name):
            change = self.registry.promote
            adapter = await asyncio.to_thread(change, name, version, by=by, expected=expected, why=why)
        self._events.publish(Promoted(name, version, by))
        return adapter

    async def unload(self, name: str, *, by: str, why: str = "", expected: int | None = None) -> Adapter:
        """No version of the name is live any more; answers under way end where they began, and all versions stay."""
        async with self._change(name):
            adapter = await asyncio.to_thread(self.registry.unload, name, by=by, why=why, expected=expected)
        self._events.publish(Unloaded(name, adapter.version, by))
        return adapter

    async def rollback(self, name: str, *, by: str, expected: int | None = None, why: str = "") -> Adapter:
        """Make the version live that was live before this one; it waits for no engine and for nobody's push."""
        async with self._change(name):
            adapter = await self._roll_back(name, by=by, expected=expected, why=why)
        self._events.publish(RolledBack(name, adapter.version, by))
        await asyncio.wait([self._start(self._warm(adapter))], timeout=WARM_SECONDS)
        return adapter

    async def _roll_back(self, name: str, *, by: str, expected: int | None, why: str) -> Adapter:
        here = partial(self.registry.roll_back_here, name, by=by, expected=expected, why=why)
        change = partial(self.registry.rollback, name, by=by, expected=expected, why=why)
        return await self._soon(f"a rollback of {name}", change, here)

    async def _soon(self, what: str, change: Callable[[], T], here: Callable[[], T]) -> T:
        """The registry's change; if that does not answer soon, on this server first (see `write_down`)."""
        changing = asyncio.create_task(asyncio.to_thread(change), name=what)
        try:
            return await asyncio.wait_for(asyncio.shield(changing), REGISTRY_SECONDS)
        except (TimeoutError, EngineUnavailable, OutOfSpace) as error:
            changing.add_done_callback(lambda done: done.cancelled() or done.exception())
            result = here()
            log.warning("%s holds on this server alone until the registry answers (%s)", what,
                        error or f"nothing for {REGISTRY_SECONDS:g} s")  # fmt: skip
        self._start(self._kept(asyncio.to_thread(self.registry.standing.keep)))
        return result

    async def _kept(self, keeping: Awaitable[None]) -> None:
        try:
            await keeping
        except OSError as error:
            log.error("a rollback that the registry does not have yet would not outlive a restart: %s", error)

    async def write_down(self) -> None:
        """Bring rollbacks that hold on this server alone into the registry, as soon as it answers again."""
        while True:
            await asyncio.sleep(WRITE_DOWN_SECONDS)
            if not self.registry.standing:
                continue
            try:
                await asyncio.to_thread(self.registry.write_down)
                await asyncio.to_thread(self.registry.refresh)
            except (EngineUnavailable, OutOfSpace):
                continue
            self.adopt()

    async def share(
        self, name: str, kind: str, version: int, weight: float, *, by: str, why: str = "", expected: int | None = None
    ) -> Share | None:
        """Give a version a share of the name's traffic as its canary or shadow; it is resident before it gets any."""
        await self._expect(name, expected)
        adapter = self.registry.get(name, version)
        if 0 < weight <= 1:
            await self._load(adapter)
        change = partial(self.registry.share, name, kind, version, weight, by=by, why=why, expected=expected)
        async with self._change(name):
            if weight or kind != "canary" or self.registry.canary(name) is None:
                return await asyncio.to_thread(change)
            here = partial(self.registry.end_canary_here, name, version, by=by, why=why)
            return await self._soon(f"the end of {adapter.tag} as a canary", change, here)

    async def pin(
        self, name: str, version: int | None = None, *, by: str, why: str = "", expected: int | None = None
    ) -> None:
        """Keep a version in the engine, or whichever is live; it is resident when this returns."""
        await self._expect(name, expected)
        base = self.fleet.of(name)
        places = base.backend.max_resident - 1
        check_pin(self.registry, name, self._traffic.pinned_names(base), places)
        if adapter := self.registry.get(name, version) if version else self.registry.live(name):
            await self._load(adapter)
        async with self._change(name), self._locks.pins:
            check_pin(self.registry, name, self._traffic.pinned_names(base), places)
            await asyncio.to_thread(self.registry.pin, name, version, by=by, why=why, expected=expected)

    async def unpin(self, name: str, *, by: str, why: str = "", expected: int | None = None) -> None:
        """Let the versions of `name` come and go again."""
        async with self._change(name):
            await asyncio.to_thread(self.registry.unpin, name, by=by, why=why, expected=expected)

    async def alias(
        self, name: str, alias: str, version: int, *, by: str, why: str = "", expected: int | None = None
    ) -> None:
        """Point NAME@ALIAS at a version, which is resident when this returns."""
        await self._expect(name, expected)
        await self._load(self.registry.get(name, version))
        async with self._change(name):
            await asyncio.to_thread(self.registry.alias, name, alias, version, by=by, why=why, expected=expected)

    async def unalias(self, name: str, alias: str, *, by: str, why: str = "", expected: int | None = None) -> None:
        """NAME@ALIAS means nothing any more."""
        async with self._change(name):
            await asyncio.to_thread(self.registry.unalias, name, alias, by=by, why=why, expected=expected)

    async def publish(self, name: str, shared: bool, *, by: str, why: str = "", expected: int | None = None) -> None:
        """Let other tenants ask the adapter too, or its own alone."""
        async with self._change(name):
            await asyncio.to_thread(self.registry.publish, name, shared, by=by, why=why, expected=expected)

    async def remove(
        self,
        name: str,
        version: int | None = None,
        *,
        by: str,
        force: bool = False,
        why: str = "",
        expected: int | None = None,
    ) -> list[Adapter]:
        """Forget a version, or all of `name`. Their answers under way finish; then the bytes go."""
        base = self.fleet.of(name)
        async with self._change(name, base):
            removed = await asyncio.to_thread(
                self.registry.delete, name, version, by=by, force=force, why=why, expected=expected
            )
        for adapter in removed:
            self._let_go(base, adapter.id, adapter.digest)
        return removed

    def adopt(self) -> None:
        """What another server has changed: old versions leave the engines here, and new ones come."""
        seen, self._seen = self._seen, self.registry.frozen()
        changed = self._seen.changed_since(seen)
        for name in changed:
            before, now = self._adopted.get(name, {}), self._traffic.of(name)
            if before.keys() == now.keys():
                continue
            self._flipped(name, before)
            if self.fleet.owner(name):
                for adapter_id in now.keys() - before.keys():
                    if self._is_home(name, now[adapter_id].rank):
                        self._start(self._warm(now[adapter_id]))
        there = {adapter_id for name in changed for adapter_id in self._seen.ids(name)}
        gone = {adapter_id: adapter for name in changed for adapter_id, adapter in seen.ids(name).items()}
        for adapter_id in gone.keys() - there:
            for base in self.fleet:
                self._let_go(base, adapter_id, gone[adapter_id].digest)
        for base in self.fleet if changed else ():
            base.pin(self._traffic.pinned(base))

    async def evict(self) -> None:
        """Once an hour, until cancelled: free the disk of versions that are at home on other servers."""
        while True:
            await asyncio.sleep(EVICT_SECONDS)
            try:
                await self.evict_strangers()
            except LoradockError as error:
                log.warning("bytes of adapters that are at home elsewhere stay here: %s", error)

    async def evict_strangers(self) -> int:
        """Remove the bytes of versions that are at home elsewhere and were not loaded here for a day; all servers see
        them, and they are pulled again where they are asked. How many that were."""
        unused = await asyncio.to_thread(self.store.unused, UNUSED_SECONDS)
        here = {resident.id.rpartition("@")[2] for base in self.fleet for resident in base.engine.residents}
        named = [adapter for adapter in self.registry.adapters() if adapter.digest in unused] if unused else []
        here |= {adapter.digest[:12] for adapter in named if self._is_home(adapter.name, adapter.rank)}
        gone = {adapter.digest for adapter in named if adapter.digest[:12] not in here}
        return sum([await asyncio.to_thread(self.store.evict, digest, UNUSED_SECONDS) for digest in sorted(gone)])

    async def settle(self) -> None:
        """Wait for the removals and loads that have begun, but not for long."""
        if self._aside:
            _, pending = await asyncio.wait(self._aside, timeout=SETTLE_SECONDS)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    @asynccontextmanager
    async def _change(self, name: str, base: Supervisor | None = None) -> AsyncIterator[None]:
        """The registry's transaction on one name; its base is told what serves now and what does not any more."""
        async with self._locks.change(name):
            before = self._traffic.of(name)
            yield
            self._flipped(name, before, base)

    async def _load(self, adapter: Adapter) -> None:
        await self.fleet.of(adapter.name).ensure(adapter.id, await self.adapters.path(adapter))

    async def _warm(self, adapter: Adapter) -> None:
        """Load an adapter that takes traffic before somebody asks for it."""
        try:
            await self._load(adapter)
        except LoradockError as error:
            log.warning("%s takes traffic and cannot be loaded: %s", adapter.tag, error)

    async def _expect(self, name: str, expected: int | None) -> None:
        if expected is not None:
            await asyncio.to_thread(self.registry.expect, name, expected)

    def _live(self, name: str) -> int | None:
        live = self.registry.live(name) if name in self.registry else None
        return live.version if live else None

    def _base(self, name: str, engine: str | None) -> Supervisor:
        """Whose adapter `name` is, or becomes by its first version."""
        if name not in self.registry:
            return self.fleet.get(engine)
        base = self.fleet.of(name)
        if engine not in (None, base.name):
            raise Conflict(
                f"the versions of this name run on {base.name}: choose another name for one on {engine}", param="engine"
            )
        return base

    def _flipped(self, name: str, before: Mapping[str, Adapter], base: Supervisor | None = None) -> None:
        """Retire versions that no longer serve; refresh pins."""
        self._adopted[name] = self._traffic.of(name)
        serving = self._adopted[name].keys()
        for adapter_id in serving - before.keys():
            self.popularity.used(adapter_id, PROMOTED)
        if base := base or self.fleet.owner(name):
            base.pin(self._traffic.pinned(base))
            for adapter_id in before.keys() - serving:
                base.engine.retire(adapter_id)

    def _let_go(self, base: Supervisor, adapter_id: str, digest: str) -> None:
        """Once its last answer has ended, free an adapter that the registry does not name (any more)."""
        self._start(self._free(base, adapter_id, digest))

    def _start(self, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Beside the change that it follows from; `settle` waits for it."""
        task = asyncio.create_task(job)
        self._aside.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._aside.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("what follows a change of an adapter failed", exc_info=error)

    async def _free(self, base: Supervisor, adapter_id: str, digest: str) -> None:
        if any(adapter.id == adapter_id for adapter in self.registry.adapters()):
            return
        for resident in base.engine.residents:
            if has_part(resident.id, adapter_id.rpartition("@")[0]):
                base.engine.retire(resident.id)
        await base.gone(adapter_id)
        # The store does not remove what a push is about to register.
        await asyncio.to_thread(self.store.remove, digest, unless=lambda kept: kept in self.registry.digests())


def _as_peft(folder: Path, model: str) -> None:
    """Make PEFT's two files of an adapter that came as a GGUF file, for the base that serves this model."""
    file = folder / GGUF_FILE
    if not file.is_file():
        return
    from serve.models.gguf.adapter import write_peft

    try:
        write_peft(file, folder_of(model), folder / CONFIG, folder / WEIGHTS)
    except ConfigError as error:
        raise AdapterRejected(error.message.replace(GGUF_FILE, "this GGUF file")) from error
    file.unlink()
