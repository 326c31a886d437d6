"""Versions on their way out: what was kept about them goes too, and a trainer's old ones go by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from serve.adapters.adapter import Adapter
from serve.auth.auth import Caller
from serve.drift.monitor import DriftMonitor
from serve.errors import Conflict, NotFound
from serve.rollout.golden.golden import Golden
from serve.rollout.lifecycle import Lifecycle
from serve.rollout.retention import surplus_versions, unloaded_names


class Removal:
    """Of a tenant's names that were loaded by path and unloaded, the newest `keep_unloaded` stay."""

    def __init__(self, lifecycle: Lifecycle, drift_monitor: DriftMonitor, golden: Golden, keep_unloaded: int) -> None:
        self._lifecycle = lifecycle
        self._drift_monitor = drift_monitor
        self._golden = golden
        self._keep_unloaded = keep_unloaded

    async def forget(self, gone: Sequence[Adapter]) -> None:
        """Let go of what was kept about versions that are removed."""
        await asyncio.to_thread(self._forget, gone)

    async def surplus(self, caller: Caller, full: str, keep: int) -> None:
        """Remove the versions of a name beyond the newest `keep`, but for those that serve or may again."""
        for old in await asyncio.to_thread(surplus_versions, self._lifecycle.registry, full, keep):
            why = f"the newest {keep} are kept"
            try:
                await self.forget(await self._lifecycle.remove(full, old.version, by=caller.name, why=why))
            except (NotFound, Conflict):
                continue  # somebody else has removed it, or made it live

    async def unloaded(self, caller: Caller, tenant: str) -> None:
        """Remove the names that were loaded by path and unloaded, but for the newest of the tenant."""
        keep = self._keep_unloaded
        for old in (await asyncio.to_thread(unloaded_names, self._lifecycle.registry, tenant))[keep:]:
            why = f"unloaded, and {keep} newer ones are kept"
            try:
                await self.forget(await self._lifecycle.remove(old, by=caller.name, expected=0, why=why))
            except (NotFound, Conflict):
                continue  # somebody else has removed it, or loaded it again

    def _forget(self, gone: Sequence[Adapter]) -> None:
        for adapter in gone:
            self._drift_monitor.forget(adapter.name, adapter.id)
            self._golden.forget(adapter, last=adapter.name not in self._lifecycle.registry)
