"""Versions on their way out: what was kept about them goes too, and a trainer's old ones go by themselves."""

import asyncio
from collections.abc import Sequence

from serve.adapters.adapter import Adapter
from serve.api.services import Services
from serve.auth.auth import Caller
from serve.errors import Conflict, NotFound
from serve.rollout.retention import surplus_versions, unloaded_names


async def forget(parts: Services, gone: Sequence[Adapter]) -> None:
    """Let go of what was kept about versions that are removed."""
    await asyncio.to_thread(_forget, parts, gone)


async def remove_surplus(parts: Services, caller: Caller, full: str, keep: int) -> None:
    """Remove the versions of a name beyond the newest `keep`, but for those that serve or may again."""
    for old in await asyncio.to_thread(surplus_versions, parts.registry, full, keep):
        why = f"the newest {keep} are kept"
        try:
            await forget(parts, await parts.lifecycle.remove(full, old.version, by=caller.name, why=why))
        except (NotFound, Conflict):
            continue  # somebody else has removed it, or made it live


async def remove_unloaded(parts: Services, caller: Caller, tenant: str) -> None:
    """Remove the names that were loaded by path and unloaded, but for the newest `keep_unloaded` of the tenant."""
    keep = parts.config.keep_unloaded
    for old in (await asyncio.to_thread(unloaded_names, parts.registry, tenant))[keep:]:
        why = f"unloaded, and {keep} newer ones are kept"
        try:
            await forget(parts, await parts.lifecycle.remove(old, by=caller.name, expected=0, why=why))
        except (NotFound, Conflict):
            continue  # somebody else has removed it, or loaded it again


def _forget(parts: Services, gone: Sequence[Adapter]) -> None:
    for adapter in gone:
        parts.drift_monitor.forget(adapter.name, adapter.id)
        parts.golden.forget(adapter, last=adapter.name not in parts.registry)
