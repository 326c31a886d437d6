"""Another server has put another model in the place of a base: so does this one.

A swap that another server is about to make is made with it (`serve.rollout.swap_together`). One that was made is made
here after it: the new engine starts beside the old one, and after it where that does not go: the memory may be enough
for one. A model that does not start here is tried again, each time after a longer wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.adapters.registry.registry import Registry
from serve.engine.base_swap import Approval, Handover, swap
from serve.engine.fleet import Fleet
from serve.engine.supervisor import Supervisor
from serve.errors import Conflict, LoradockError
from serve.rollout.swap_together import Announcement, Following, Leading, State, SwapRows

log = logging.getLogger(__name__)

# Who did it, as the log says.
WHO = "follower"
LOOK_SECONDS = 1.0
# Between two tries of the same model: the second one stops the traffic, so it is rare.
RETRY_SECONDS, MAX_RETRY_SECONDS = 60.0, 3600.0


@dataclass(slots=True)
class _Failure:
    model: str
    count: int
    again: float
    why: str


class SwapFollower:
    """`run` looks at the registry until it is cancelled."""

    def __init__(
        self,
        registry: Registry,
        fleet: Fleet,
        clock: Callable[[], float] = time.monotonic,
        me: str = "",
        living: Callable[[], set[str]] = set,
    ) -> None:
        self._registry = registry
        self._fleet = fleet
        self._clock = clock
        self._me = me
        # The ids of the servers that live.
        self._living = living
        self._rows = SwapRows(registry)
        self._failures: dict[str, _Failure] = {}
        # The announcement of each base that was tried last.
        self._prepared: dict[str, Announcement] = {}

    @property
    def problem(self) -> str:
        """Which bases serve another model here than elsewhere, and why."""
        return "; ".join(
            f"{name} is not {failure.model} here: {failure.why}" for name, failure in self._failures.items()
        )

    async def run(self) -> None:
        while True:
            for base in self._fleet:
                try:
                    await self.follow(base)
                except LoradockError as error:
                    log.warning("whether %s was swapped elsewhere is not known now: %s", base.name, error)
            await asyncio.sleep(LOOK_SECONDS)

    async def follow(self, base: Supervisor) -> None:
        """Swap this base, if it was swapped elsewhere and may be tried."""
        if not base.is_ready or base.swapping:
            return
        await self._prepare(base)
        recorded = await asyncio.to_thread(self._registry.swapped, base.name, base.configured)
        model = recorded or base.configured
        failure = self._failures.get(base.name)
        if model == base.model or (failure and failure.model != model):
            failure = self._failures.pop(base.name, None) and None
        if model == base.model or (failure and self._clock() < failure.again):
            return
        log.info("another server swapped %s to %s: so does this one", base.name, model)
        try:
            await self._swap(base, model)
            self._failures.pop(base.name, None)
        except LoradockError as error:
            count = failure.count + 1 if failure else 1
            wait = min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2 ** (count - 1))
            self._failures[base.name] = _Failure(model, count, self._clock() + wait, str(error))
            log.error("%s was swapped on another server, and is not here (again in %.0f s): %s", base.name, wait, error)

    def leading(self) -> Leading:
        """The pace of a swap that this server is asked for."""
        return Leading(self._rows, self._me, self._living)

    async def _prepare(self, base: Supervisor) -> None:
        """Make a swap that another server is about to make, at the same time."""
        announced = await asyncio.to_thread(self._rows.announced, base.name)
        if announced is None or announced == self._prepared.get(base.name):
            return
        if announced.server == self._me or announced.server not in self._living():
            return
        self._prepared[base.name] = announced
        if announced.model == base.model:
            await asyncio.to_thread(self._rows.tell, base.name, self._me, State.ASIDE)
            return
        log.info(
            "%s is about to be swapped to %s by %s: so does this server", base.name, announced.model, announced.server
        )
        await asyncio.to_thread(self._rows.tell, base.name, self._me, State.STARTING)
        pace = Following(self._rows, self._registry, self._me, announced, self._living)
        try:
            await swap(base, announced.model, by=WHO, approval=Approval.FOLLOWED, pace=pace)
        except LoradockError as error:
            log.warning("%s is not swapped to %s together with the others: %s", base.name, announced.model, error)
            await pace.over(base)  # also where it had not begun

    async def _swap(self, base: Supervisor, model: str) -> None:
        try:
            await swap(base, model, by=WHO, approval=Approval.FOLLOWED)
        except Conflict as error:
            log.info("%s does not start beside the engine that serves, so after it: %s", model, error)
            await swap(base, model, by=WHO, approval=Approval.FOLLOWED, handover=Handover.DRAIN_FIRST)
