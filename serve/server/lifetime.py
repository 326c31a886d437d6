"""What is started with a server and stopped with it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

# What blocks is called in a thread.
Step: TypeAlias = Callable[[], Awaitable[None]] | Callable[[], None]


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How a part is started and stopped, if it has to be; it is stopped also where it fails to start."""

    start: Step | None = None
    stop: Step | None = None


@asynccontextmanager
async def started(lifetimes: Iterable[Lifetime]) -> AsyncIterator[None]:
    """Starts them in their order and stops them in reverse; what fails to stop keeps no other one from it."""
    async with AsyncExitStack() as closing:
        for lifetime in lifetimes:
            closing.push_async_callback(_called, lifetime.stop)
            await _called(lifetime.start)
        yield


async def _called(step: Step | None) -> None:
    if step is None:
        return
    if inspect.iscoroutinefunction(step):
        await step()
    else:
        await asyncio.to_thread(step)
