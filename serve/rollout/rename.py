"""An adapter gets another name, and nobody who asks it notices: the old name leads to the new one until it is removed.

In the engine a version's name is part of its id, so a rename brings its versions in once more under the new one, before
a request meets them. Answers under way end under the old.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from serve.adapters.adapter import Adapter
from serve.adapters.registry.change import check_rename
from serve.names import check_adapter_name
from serve.rollout.lifecycle import Lifecycle


async def rename(
    lifecycle: Lifecycle, name: str, new: str, *, by: str, why: str = "", expected: int | None = None
) -> list[Adapter]:
    """The versions as they were called."""
    check_adapter_name(new, [base.name for base in lifecycle.fleet])
    registry, base = lifecycle.registry, lifecycle.fleet.of(name)
    # Before another adapter leaves the engine in vain; the change itself looks again.
    shares = [kind for kind, share in (("canary", registry.canary(name)), ("shadow", registry.shadow(name))) if share]
    check_rename(name, new, shares, new in registry)
    if expected is not None:
        await asyncio.to_thread(registry.expect, name, expected)
    serving = (registry.live(name), registry.pinned(name), *registry.aliases(name).values())
    for adapter in dict.fromkeys(serving):
        if adapter:
            await base.ensure(replace(adapter, name=new).id, await lifecycle.adapters.path(adapter))
    # Neither name changes meanwhile.
    async with lifecycle.adapters.unchanged():
        before = registry.versions(name)
        await asyncio.to_thread(registry.rename, name, new, by=by, why=why, expected=expected)
        lifecycle.adopt()
    return before
