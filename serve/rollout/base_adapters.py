"""What the engines of a base hold: which versions, from where, and while what does not change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from serve.adapters.adapter import Adapter, Limits
from serve.adapters.inspection import inspect
from serve.adapters.registry.registry import Registry
from serve.adapters.store import Store
from serve.engine.backend import Backend
from serve.engine.engine import Engine
from serve.engine.supervisor import Supervisor
from serve.errors import EngineUnavailable, LoradockError
from serve.events import BaseSwapped, Events
from serve.rollout.change_locks import ChangeLocks
from serve.rollout.traffic import Traffic

log = logging.getLogger(__name__)


class BaseAdapters:
    """As a supervisor takes it (`serve.engine.supervisor.Adapters`)."""

    def __init__(self, traffic: Traffic, registry: Registry, store: Store, locks: ChangeLocks, events: Events) -> None:
        self._traffic = traffic
        self._registry = registry
        self._store = store
        self._locks = locks
        self._events = events

    def wanted(self, base: Supervisor) -> list[Adapter]:
        """What a fresh engine should hold, the most important first."""
        return self._traffic.wanted(base)

    async def restore(self, base: Supervisor, engine: Engine) -> None:
        """Bring the pinned and the most popular live versions of a base into a fresh engine."""
        engine.pin(self._traffic.pinned(base))
        for adapter in self.wanted(base)[: engine.backend.max_resident]:
            try:
                await engine.ensure(adapter.id, await self.path(adapter))
            except EngineUnavailable:
                raise
            except LoradockError as error:
                log.warning("%s takes traffic and cannot be loaded: %s", adapter.tag, error)

    async def path(self, adapter: Adapter) -> Path:
        return await self._store.bring(adapter.digest)

    def check(self, adapter: Adapter, backend: Backend, modules: Mapping[str, tuple[int, int]]) -> None:
        """AdapterRejected, if a base with these modules cannot run it."""
        inspect(self._store.path(adapter.digest), modules, Limits(backend.max_lora_rank, may_change_nothing=True))

    def unchanged(self) -> AbstractAsyncContextManager[Any]:
        """While it lasts no adapter changes."""
        return self._locks.everything()

    async def record_swap(self, base: Supervisor, model: str, by: str) -> None:
        await asyncio.to_thread(self._registry.swap, base.name, base.configured, model, by=by)
        self._events.publish(BaseSwapped(base.name, model, by))

    async def swapped_model(self, base: Supervisor) -> str | None:
        return await asyncio.to_thread(self._registry.swapped, base.name, base.configured)
