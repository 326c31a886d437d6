"""How patient a supervisor is, how often it starts an engine again, and when: engines of a server start in turn."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

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
    max_wait: float = 30.0  # a request that would wait longer for its turn is refused
    drain_timeout: float = 600.0  # that answers of an engine that was replaced get to finish


class RestartBudget:
    """How many restarts are left, and how long to wait before the next one."""

    def __init__(self, patience: Patience, clock: Callable[[], float]) -> None:
        self._patience = patience
        self._clock = clock
        self._deaths: deque[float] = deque()
        # The latest one: when, in seconds since 1970, and what the engine before it died of.
        self.last: dict[str, Any] | None = None

    @property
    def deaths(self) -> int:
        """Within the window."""
        return len(self._deaths)

    @property
    def delay(self) -> float:
        """Seconds to wait before the next restart; none before the first."""
        if self.deaths < 2:
            return 0.0
        return min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (self.deaths - 2))

    def count_death(self) -> bool:
        """Whether another restart is allowed after this death."""
        now = self._clock()
        self._deaths.append(now)
        while self._deaths[0] < now - self._patience.restart_window:
            self._deaths.popleft()
        return self.deaths <= self._patience.max_restarts

    def began(self, cause: str) -> None:
        """A restart begins after that death."""
        self.last = {"at": time.time(), "reason": cause}

    def reset(self) -> None:
        self._deaths.clear()


class StartTurn:
    """One engine of a server starts at a time, also where several died of the same cause.

    vLLM measures how much of a GPU's memory its engine takes by what is free before and after: of two that start at
    once each counts the other's weights as its own, and one of them finds no room for a KV cache. An engine that hangs
    while it starts keeps the others from starting for `longest` seconds.
    """

    def __init__(self, longest: float = 300.0) -> None:
        self._longest = longest
        self._starting = asyncio.Lock()

    @asynccontextmanager
    async def taken(self, name: str) -> AsyncIterator[None]:
        """While it lasts no other engine starts, unless this one waited too long for its turn."""
        try:
            async with asyncio.timeout(self._longest):
                await self._starting.acquire()
        except TimeoutError:
            log.warning("the engine for %s starts beside another one, which has not started in time", name)
            yield
            return
        try:
            yield
        finally:
            self._starting.release()
