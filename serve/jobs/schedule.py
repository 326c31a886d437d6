"""Which work of a table this server runs: batches, fine-tuning jobs, loops.

It claims what it begins, renews the claim while it works and gives it up in the end (`registry.work_table`): a server
that was killed keeps the others from its work for `CLAIM_SECONDS`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from serve.errors import LoradockError

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
CLAIM_SECONDS, RENEW_SECONDS = 30.0, 5.0
# What cannot be run now is looked at again after this.
PAUSE_SECONDS = 30.0
SWEEP_SECONDS = 300.0

Item = TypeVar("Item")
Kept = TypeVar("Kept", covariant=True)


class Rows(Protocol[Kept]):
    """Where work is kept."""

    def claim(self, id: str, seconds: float, /) -> Kept | None: ...

    def release(self, id: str | None = None, /) -> None: ...


class Work(Protocol):
    """What this server runs; `wake` has its claim looked at now."""

    wake: asyncio.Event


W = TypeVar("W", bound=Work)


class Schedule(ABC, Generic[Item, W]):
    """What this server runs, for one event loop. `alone` says that no other server shares the registry."""

    what: str

    def __init__(
        self,
        rows: Rows[Item],
        run: Callable[[W], Awaitable[None]],
        *,
        alone: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._claims = rows
        self._run_work = run
        self._alone = alone
        self._clock = clock
        self._wake = asyncio.Event()
        self._working: dict[str, tuple[W, asyncio.Task[None]]] = {}
        self._paused: dict[str, float] = {}
        self._swept = 0.0

    @abstractmethod
    async def round(self) -> None:
        """Begin what can be begun."""

    @abstractmethod
    def _can_read(self, item: Item) -> bool:
        """Its files are on this server, or where it can fetch them. Blocks."""

    @abstractmethod
    def _renewed(self, work: W, item: Item | None, lost: bool) -> None:
        """What its claim's row says now, None where the database did not answer; `lost` to another server, or ended."""

    def _ended(self) -> None:
        """Some work runs no more."""

    def wake(self, id: str | None = None) -> None:
        """Something came, or this was changed by somebody: look now."""
        if id in self._working:
            self._working[id][0].wake.set()
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled; what runs is cancelled with it, and has saved what it can when this returns."""
        if self._alone:
            await asyncio.to_thread(self._claims.release)
        try:
            while True:
                try:
                    await self.round()
                except LoradockError as error:
                    log.warning("%s are not looked at now: %s", self.what, error.message)
                await _within(LOOK_SECONDS, self._wake)
        finally:
            tasks = [task for _, task in self._working.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _is_free(self, id: str) -> bool:
        """Neither run here nor to be left alone for now."""
        return id not in self._working and self._paused.get(id, 0.0) <= self._clock()

    def _pause(self, id: str) -> None:
        now = self._clock()
        self._paused = {other: until for other, until in self._paused.items() if until > now}
        self._paused[id] = now + PAUSE_SECONDS

    async def _claim(self, id: str) -> Item | None:
        """What this server has the claim of now; None if it is another one's, or has its files alone."""
        item = await asyncio.to_thread(self._claims.claim, id, CLAIM_SECONDS)
        if item is not None and not self._alone and not await asyncio.to_thread(self._can_read, item):
            await asyncio.to_thread(self._claims.release, id)
            self._pause(id)
            return None
        return item

    def _start(self, id: str, work: W) -> None:
        """Run what this server has the claim of."""
        self._working[id] = (work, asyncio.create_task(self._work(id, work)))

    async def _work(self, id: str, work: W) -> None:
        keeping = asyncio.create_task(self._keep(id, work))
        try:
            await self._run_work(work)
        except LoradockError as error:
            log.warning("%s is not run now: %s", id, error.message)
            self._pause(id)
        except Exception:  # whatever it brings about, the others are run
            log.exception("%s is not run now", id)
            self._pause(id)
        finally:
            keeping.cancel()
            try:
                await asyncio.shield(asyncio.to_thread(self._claims.release, id))
            except LoradockError as error:
                log.warning("the claim of %s ends by itself: %s", id, error.message)
            del self._working[id]
            self._ended()
            self._wake.set()

    async def _keep(self, id: str, work: W) -> None:
        """Renew the claim until it is lost."""
        held_until, lost = self._clock() + CLAIM_SECONDS, False
        while not lost:
            item = None
            try:
                item = await asyncio.to_thread(self._claims.claim, id, CLAIM_SECONDS)
                lost, held_until = item is None, self._clock() + CLAIM_SECONDS
            except LoradockError as error:
                lost = self._clock() > held_until
                log.warning("the claim of %s was not renewed: %s", id, error.message)
            self._renewed(work, item, lost)
            if not lost:
                await _within(RENEW_SECONDS, work.wake)


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Until the event, which is over then, or for so long."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
    event.clear()
