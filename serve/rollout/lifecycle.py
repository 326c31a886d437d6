"""What happens to an adapter from upload to removal: every change in one place, one after the other.

push:      inspect > store > load > probe > register > flip the pointer > retire the old version
remove:    forget > wait for its last answer > free the engine > free the disk
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

from serve.adapters.adapter import Adapter, Inspection, Limits, check_digest, inspect
from serve.adapters.registry import Registry, Share
from serve.adapters.store import Store
from serve.auth.rate_limits import UNLIMITED
from serve.auth.rate_limits import Limits as KeyLimits
from serve.engine.engine import Backend, Engine
from serve.engine.fleet import Fleet
from serve.engine.supervisor import Supervisor
from serve.errors import BadRequest, Conflict, EngineUnavailable, LoradockError, QuotaExceeded
from serve.names import DEFAULT, check_full_name, short_name, tenant_of
from serve.rollout.prefetch import Popularity

log = logging.getLogger(__name__)

# DELETE /v1/adapters/TENANT/pin would be both the adapter TENANT's pin and the tenant's adapter `pin`; so with
# GET /v1/adapters/TENANT/drift and /baseline.
RESERVED = ("pin", "drift", "baseline")
# The places for pinned adapters that one tenant may take, as a part of all; `default` may take them all.
PINS_OF_A_TENANT = 4
# A version that takes over the traffic counts as used so often, at once.
PROMOTED = 8.0
# Seconds between two looks at what ought to be in an engine's memory, and between two notes of what is popular.
PREFETCH_SECONDS, SAVE_SECONDS = 1.0, 60.0


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
        popularity: Popularity | None = None,
    ) -> None:
        self.fleet = fleet
        self.registry = registry
        self.store = store
        self.popularity = popularity or Popularity()
        self._limits = limits
        # Hears of a fresh engine before its adapters come.
        self.meet: Callable[[Supervisor, Engine], Awaitable[None]] | None = None
        # One change at a time: reads and answers never take this lock.
        self._changing = asyncio.Lock()
        self._removing: set[asyncio.Task[None]] = set()
        # Which versions serve, by name, as of the last change that reached the engines; and all that there are.
        self._adopted: dict[str, dict[str, Adapter]] = {name: self._serving(name) for name in registry.names()}
        self._known = {adapter.id: adapter for adapter in registry.adapters()}

    async def sweep(self) -> None:
        """Before the first engine starts: remove what no version names."""
        digests = self.registry.digests()
        await asyncio.to_thread(self.store.sweep, digests)
        if self.store.shared is not None:
            try:
                await asyncio.to_thread(self.store.shared.sweep, digests)
            except LoradockError as error:
                log.warning("what nobody names any more stays where all servers see it: %s", error)

    async def restore(self, base: Supervisor, engine: Engine) -> None:
        """Bring the pinned and the most popular live versions of a base into a fresh engine."""
        if self.meet:
            await self.meet(base, engine)
        engine.pinned = self._pinned(base)
        for adapter in self.wanted(base)[: engine.backend.max_resident]:
            try:
                await engine.ensure(adapter.id, await self.path(adapter))
            except EngineUnavailable:
                raise
            except LoradockError as error:
                log.warning("%s takes traffic and cannot be loaded: %s", adapter.tag, error)

    async def keep_warm(self, notes: Path) -> None:
        """Until cancelled: bring popular adapters back that were pushed out, and note in a file which are popular."""
        turns = round(SAVE_SECONDS / PREFETCH_SECONDS)
        try:
            for turn in itertools.count(1):
                await asyncio.sleep(PREFETCH_SECONDS)
                for base in self.fleet:
                    with suppress(LoradockError):  # whoever asks for that adapter hears of it
                        await self.prefetch(base)
                if turn % turns == 0:
                    await asyncio.to_thread(self.popularity.save, notes)
        finally:
            self.popularity.save(notes)

    async def prefetch(self, base: Supervisor) -> Adapter | None:
        """Load the most popular adapter that takes traffic and was pushed out, if nobody waits for the engine.

        As many places as a batch has slots are left to whoever comes.
        """
        if not base.is_ready or base.engine.queue.waiting:
            return None
        for adapter in self.wanted(base)[: max(base.backend.max_resident - base.backend.slots, 1)]:
            if self.popularity.uses(adapter.id) > 1 and not base.holds(adapter.id):
                await base.ensure(adapter.id, await self.path(adapter))
                return adapter
        return None

    async def path(self, adapter: Adapter) -> Path:
        return await self.store.bring(adapter.digest)

    def check(self, adapter: Adapter, backend: Backend, modules: Mapping[str, tuple[int, int]]) -> None:
        """AdapterRejected, if a base with these modules cannot run it."""
        inspect(self.store.path(adapter.digest), modules, Limits(max_rank=backend.max_lora_rank))

    def unchanged(self) -> AbstractAsyncContextManager[Any]:
        """While it lasts no adapter changes."""
        return self._changing

    async def record_swap(self, base: Supervisor, model: str, by: str) -> None:
        await asyncio.to_thread(self.registry.swap, base.name, base.configured, model, by=by)

    async def swapped_model(self, base: Supervisor) -> str | None:
        return await asyncio.to_thread(self.registry.swapped, base.name, base.configured)

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
    ) -> tuple[Adapter, bool]:
        """Admit the PEFT adapter in `folder` as a version of `name`; whether it is new. An error changes nothing."""
        check_full_name(name)
        short = short_name(name, tenant_of(name))
        if taken := next((base.name for base in self.fleet if base.name in (name, short)), None):
            raise Conflict(f"{taken!r} is the base model's name: choose another for the adapter", param="name")
        if short in RESERVED:
            raise BadRequest(
                f"{short!r} cannot be an adapter's name, because it ends a path of this server: choose another",
                param="name",
            )
        base = self._base(name, engine)
        await base.available()
        limits = self._limits(base)
        inspection = await asyncio.to_thread(inspect, folder, base.modules, limits)
        async with self._changing:
            await self._expect(name, expected)
            digest = await asyncio.to_thread(self.store.admit, folder)
            adapter_id = f"{name}@{digest[:12]}"
            before = self._serving(name)
            try:
                self._check_quota(name, digest, inspection, quota)
                check_digest(digest, limits)
                path = self.store.path(digest)
                await base.ensure(adapter_id, path)
                checks = await base.probe.judge(adapter_id, path) if base.probe else {}
                if inspection.license:
                    checks["license"] = inspection.license
                checks["base_model"] = base.model
                await asyncio.to_thread(self.store.publish, digest)
                adapter, created = await asyncio.to_thread(
                    self.registry.add,
                    name,
                    inspection,
                    digest,
                    by=by,
                    promote=promote,
                    why=why,
                    shared=shared,
                    checks=checks,
                    base=None if base is self.fleet.first else base.name,
                    expected=expected,
                )
            except BaseException:
                self._let_go(base, adapter_id, digest)
                raise
            self._flipped(name, before)
            if adapter.id not in self._serving(name):
                base.retire(adapter.id)
            return adapter, created

    async def promote(self, name: str, version: int, *, by: str, expected: int | None = None, why: str = "") -> Adapter:
        """Make a version live: requests from now on answer from it, those under way finish where they began."""
        async with self._changing:
            await self._expect(name, expected)
            adapter = self.registry.get(name, version)
            await self.fleet.of(name).ensure(adapter.id, await self.path(adapter))
            before = self._serving(name)
            change = self.registry.promote
            adapter = await asyncio.to_thread(change, name, version, by=by, expected=expected, why=why)
            self._flipped(name, before)
            return adapter

    async def rollback(self, name: str, *, by: str, expected: int | None = None, why: str = "") -> Adapter:
        """Make the version live that was live before this one."""
        await self.fleet.of(name).available()  # or it would be done, and answered with a 503
        async with self._changing:
            before = self._serving(name)
            adapter = await asyncio.to_thread(self.registry.rollback, name, by=by, expected=expected, why=why)
            self._flipped(name, before)
            await self.fleet.of(name).ensure(adapter.id, await self.path(adapter))
            return adapter

    async def share(
        self, name: str, kind: str, version: int, weight: float, *, by: str, why: str = "", expected: int | None = None
    ) -> Share | None:
        """Give a version a share of the name's traffic as its canary or shadow; it is resident before it gets any."""
        async with self._changing:
            await self._expect(name, expected)
            adapter = self.registry.get(name, version)
            before = self._serving(name)
            if 0 < weight <= 1:
                await self.fleet.of(name).ensure(adapter.id, await self.path(adapter))
            share = await asyncio.to_thread(
                self.registry.share, name, kind, version, weight, by=by, why=why, expected=expected
            )
            self._flipped(name, before)
            return share

    async def pin(
        self, name: str, version: int | None = None, *, by: str, why: str = "", expected: int | None = None
    ) -> None:
        """Keep a version in the engine, or whichever is live; it is resident when this returns."""
        async with self._changing:
            await self._expect(name, expected)
            room = self.fleet.of(name).backend.max_resident - 1
            if len({*self._pinned_names(self.fleet.of(name)), name}) > room:
                raise Conflict(
                    f"{room} adapters are pinned, as many as this engine holds beside one that comes and goes: "
                    "unpin one, or raise max_cpu_loras"
                )
            tenant = tenant_of(name)
            most = max(1, room // PINS_OF_A_TENANT)
            pinned = {one for one in self.registry.pinned_names() if tenant_of(one) == tenant} | {name}
            if tenant != DEFAULT and len(pinned) > most:
                raise QuotaExceeded(f"tenant {tenant} may pin {most} of its adapters: unpin one that it needs less")
            wanted = self.registry.get(name, version) if version else self.registry.live(name)
            if wanted:
                await self.fleet.of(name).ensure(wanted.id, await self.path(wanted))
            before = self._serving(name)
            await asyncio.to_thread(self.registry.pin, name, version, by=by, why=why, expected=expected)
            self._flipped(name, before)

    async def unpin(self, name: str, *, by: str, why: str = "", expected: int | None = None) -> None:
        """Let the versions of `name` come and go again."""
        async with self._changing:
            before = self._serving(name)
            await asyncio.to_thread(self.registry.unpin, name, by=by, why=why, expected=expected)
            self._flipped(name, before)

    async def publish(self, name: str, shared: bool, *, by: str, why: str = "", expected: int | None = None) -> None:
        """Let other tenants ask the adapter too, or its own alone."""
        async with self._changing:
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
        async with self._changing:
            base, before = self.fleet.of(name), self._serving(name)
            removed = await asyncio.to_thread(
                self.registry.delete, name, version, by=by, force=force, why=why, expected=expected
            )
            self._flipped(name, before, base)
            for adapter in removed:
                self._let_go(base, adapter.id, adapter.digest)
            return removed

    def adopt(self) -> None:
        """What another server has changed: old versions leave the engines here, and new ones come."""
        there = {adapter.id: adapter for adapter in self.registry.adapters()}
        for name in {*self._adopted, *self.registry.names()}:
            before, now = self._adopted.get(name, {}), self._serving(name)
            if before.keys() == now.keys():
                continue
            base = self.fleet.of(name)
            self._flipped(name, before, base)
            for adapter_id in now.keys() - before.keys():
                self._aside(self._warm(base, now[adapter_id]))
        for adapter_id, adapter in self._known.items():
            if adapter_id not in there:
                for base in self.fleet:
                    self._let_go(base, adapter_id, adapter.digest)
        for base in self.fleet:
            base.pinned = self._pinned(base)
        self._known = there

    async def _warm(self, base: Supervisor, adapter: Adapter) -> None:
        """Have an adapter in the engine before somebody asks for it."""
        try:
            await base.ensure(adapter.id, await self.path(adapter))
        except LoradockError as error:
            log.warning("%s takes traffic and cannot be loaded: %s", adapter.tag, error)

    async def settle(self) -> None:
        """Wait for the removals that have begun."""
        await asyncio.gather(*self._removing, return_exceptions=True)

    def describe(self, adapter: Adapter) -> dict[str, Any]:
        """An adapter version for the API."""
        live = self.registry.live(adapter.name)
        return {
            "object": "adapter.version",
            "name": adapter.name,
            "tenant": adapter.tenant,
            "visibility": "shared" if self.registry.shared(adapter.name) else "private",
            "version": adapter.version,
            "id": adapter.id,
            "digest": adapter.digest,
            "engine": self.registry.base(adapter.name) or self.fleet.first.name,
            "live": live == adapter,
            "pinned": self.registry.pinned(adapter.name) == adapter,
            "resident": any(base.holds(adapter.id) for base in self.fleet),
            "base": adapter.base,
            "rank": adapter.rank,
            "target_modules": list(adapter.target_modules),
            "bytes": adapter.nbytes,
            "created": int(adapter.created),
            "checks": dict(adapter.checks),
        }

    async def _expect(self, name: str, expected: int | None) -> None:
        if expected is not None:
            await asyncio.to_thread(self.registry.expect, name, expected)

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

    def _check_quota(self, name: str, digest: str, inspection: Inspection, quota: KeyLimits) -> None:
        """QuotaExceeded, if the tenant would keep more than this key may let it."""
        kept = [adapter for adapter in self.registry.adapters() if adapter.tenant == tenant_of(name)]
        if any(adapter.name == name and adapter.digest == digest for adapter in kept):
            return
        if quota.adapters is not None and len({adapter.name for adapter in kept} | {name}) > quota.adapters:
            raise QuotaExceeded(f"this key's tenant may keep {quota.adapters} adapters: delete one that nobody uses")
        nbytes = sum(adapter.nbytes for adapter in kept) + inspection.nbytes
        if quota.adapter_bytes is not None and nbytes > quota.adapter_bytes:
            raise QuotaExceeded(
                f"with this one the tenant's adapters take {nbytes} bytes, and this key may let them take "
                f"{quota.adapter_bytes}: delete versions that nobody uses"
            )

    def _serving(self, name: str) -> dict[str, Adapter]:
        """The versions of `name` that get traffic without being named, by id: pinned, live, canary, shadow."""
        reads = self.registry
        shares = [share.adapter for share in (reads.canary(name), reads.shadow(name)) if share]
        return {adapter.id: adapter for adapter in (reads.pinned(name), reads.live(name), *shares) if adapter}

    def wanted(self, base: Supervisor) -> list[Adapter]:
        """What a fresh engine should hold, the most important first."""
        names = [name for name in self.registry.names() if self.fleet.owns(base, name)]
        pinned = [adapter for name in self._pinned_names(base) if (adapter := self.registry.pinned(name))]
        serving = {adapter.id: adapter for name in names for adapter in self._serving(name).values()}
        popular = [serving[one] for one in self.popularity.ranked(serving)]
        return list({adapter.id: adapter for adapter in (*pinned, *popular)}.values())

    def _flipped(self, name: str, before: Mapping[str, Adapter], base: Supervisor | None = None) -> None:
        """What served and does not any more leaves; what is pinned now stays."""
        base = base or self.fleet.of(name)
        base.pinned = self._pinned(base)
        self._adopted[name] = self._serving(name)
        serving = self._adopted[name].keys()
        for adapter_id in serving - before.keys():
            self.popularity.used(adapter_id, PROMOTED)
        for adapter_id in before.keys() - serving:
            base.retire(adapter_id)

    def _pinned_names(self, base: Supervisor) -> list[str]:
        return [name for name in self.registry.pinned_names() if self.fleet.owns(base, name)]

    def _pinned(self, base: Supervisor) -> frozenset[str]:
        found = (self.registry.pinned(name) for name in self._pinned_names(base))
        return frozenset(adapter.id for adapter in found if adapter)

    def _let_go(self, base: Supervisor, adapter_id: str, digest: str) -> None:
        """Once its last answer has ended, free an adapter that the registry does not name (any more)."""
        self._aside(self._free(base, adapter_id, digest))

    def _aside(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(job)
        self._removing.add(task)
        task.add_done_callback(self._removing.discard)

    async def _free(self, base: Supervisor, adapter_id: str, digest: str) -> None:
        if any(adapter.id == adapter_id for adapter in self.registry.adapters()):
            return
        await base.gone(adapter_id)
        async with self._changing:
            if digest not in self.registry.digests():
                await asyncio.to_thread(self.store.remove, digest)
