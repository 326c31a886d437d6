"""Answers that no client waits for: of golden sets, shadows, replays, baselines and gates of loops.

Each has a lease that admission learns nothing from, behind every client in the engine's queue, on its payer's account.
No metric of traffic counts them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serve.adapters.adapter import Adapter
from serve.adapters.store import Store
from serve.engine.engine import LOW_PRIORITY, Lease
from serve.engine.payer import Payer
from serve.engine.supervisor import Supervisor

# While clients are answered a question waits, but no longer than this; then it goes behind them in the engine's queue.
GAP_SECONDS, LOOK_SECONDS = 2.0, 0.05


def is_idle(base: Supervisor) -> bool:
    """No client is answered."""
    return base.leases <= base.background


async def gap(base: Supervisor) -> None:
    """Wait while clients are answered, but not for long."""
    loop = asyncio.get_running_loop()
    end = loop.time() + GAP_SECONDS
    while not is_idle(base) and loop.time() < end:
        await asyncio.sleep(LOOK_SECONDS)


@asynccontextmanager
async def background_lease(
    base: Supervisor, store: Store, adapter: Adapter | None, payer: Payer, *, sequences: int = 1
) -> AsyncIterator[Lease]:
    """A lease on a version, or on the base itself, until the block ends."""
    place = await store.bring(adapter.digest) if adapter else None
    await base.available()
    id = adapter.id if adapter else None
    async with base.engine.lease(id, place, payer=payer, priority=LOW_PRIORITY, sequences=sequences) as lease:
        yield lease
