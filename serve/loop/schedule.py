"""Which loops this server drives: those where there is something to do, claimed from the database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from serve.adapters.registry.registry import Registry
from serve.jobs.schedule import Schedule
from serve.loop.driver import REJECT, LoopDriver, Work
from serve.loop.loop_rows import LoopRows
from serve.loop.metrics import LoopMetrics
from serve.loop.objects import Loop
from serve.rollout.policy import Policies


class LoopSchedule(Schedule[Loop, Work]):
    """The schedule of loops."""

    what = "loops"

    def __init__(
        self,
        rows: LoopRows,
        registry: Registry,
        driver: LoopDriver,
        metrics: LoopMetrics,
        policies: Policies,
        *,
        alone: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(rows, driver.run, alone=alone, clock=clock)
        self._rows = rows
        self._registry = registry
        self._driver = driver
        self._metrics, self._policies = metrics, policies
        self._stopped = False
        self._event_loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Until cancelled."""
        self._event_loop = asyncio.get_running_loop()
        await super().run()

    def look_now(self) -> None:
        """As `wake`, from any thread."""
        if self._event_loop is not None:
            with suppress(RuntimeError):  # the event loop is closed
                self._event_loop.call_soon_threadsafe(self.wake)

    async def round(self) -> None:
        """Take a step of every loop that has one to take."""
        loops, stopped = await asyncio.to_thread(self._look)
        self._stopped = stopped
        self._metrics.see([loop for loop in loops if self._policies[loop.name].loop.on], stopped)
        free = [loop for loop in loops if self._is_free(loop.id)]
        for loop in await asyncio.to_thread(self._driver.due, free, stopped):
            if claimed := await self._claim(loop.id):
                self._start(loop.id, Work(claimed))

    def _look(self) -> tuple[list[Loop], bool]:
        """Every loop, made where a policy is new, and forgotten where its adapter is gone."""
        loops = self._rows.all()
        names = set(self._registry.names())
        for loop in loops:
            if loop.name not in names:
                self._rows.forget(loop.id)
        known = {loop.name for loop in loops}
        made = [self._rows.made(name) for name in names - known if self._policies[name].loop.on]
        return [loop for loop in loops if loop.name in names] + made, self._rows.stopped() is not None

    def _can_read(self, loop: Loop) -> bool:
        return True

    def _renewed(self, work: Work, loop: Loop | None, lost: bool) -> None:
        if loop is not None:
            asked = loop.wish is not None and loop.wish["what"] == REJECT
            lost = lost or asked or loop.stopped is not None or self._stopped
        work.stop = work.stop or lost
