"""Which batches this server runs: one of each tenant at a time, the oldest first, claimed from the database.

A claim ends by itself: a server that was killed keeps the others from its batches for `CLAIM_SECONDS`. A server that
shares its registry with nobody takes its own claims back when it starts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from serve.errors import LoradockError
from serve.gateway.batches.batch_rows import BatchRows
from serve.gateway.batches.batch_runner import BatchRunner, Work
from serve.gateway.batches.file_bytes import FileBytes
from serve.gateway.batches.file_rows import FileRows
from serve.gateway.batches.metrics import BatchMetrics
from serve.gateway.batches.objects import Batch, Status

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
CLAIM_SECONDS, RENEW_SECONDS = 30.0, 5.0
# Batches that one server runs at a time.
AT_ONCE = 16
# A batch that cannot be run now is looked at again after this.
PAUSE_SECONDS = 30.0
SWEEP_SECONDS = 300.0
# Batches at their end are listed for so long.
KEPT_SECONDS = 90 * 86_400.0


class BatchSchedule:
    """For one event loop. `alone` says that no other server shares the registry."""

    def __init__(
        self,
        rows: BatchRows,
        files: FileRows,
        contents: FileBytes,
        runner: BatchRunner,
        metrics: BatchMetrics,
        *,
        alone: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rows, self._files, self._contents, self._runner = rows, files, contents, runner
        self._metrics, self._alone, self._clock = metrics, alone, clock
        self._wake = asyncio.Event()
        self._working: dict[str, tuple[Work, asyncio.Task[None]]] = {}
        self._paused: dict[str, float] = {}
        self._swept = 0.0

    def wake(self, id: str | None = None) -> None:
        """A batch came, or this one was cancelled: look now."""
        if id in self._working:
            self._working[id][0].wake.set()
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        if self._alone:
            await asyncio.to_thread(self._rows.release)
        try:
            while True:
                try:
                    await self.round()
                except LoradockError as error:
                    log.warning("batches are not looked at now: %s", error.message)
                try:
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
        finally:
            tasks = [task for _, task in self._working.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def round(self) -> None:
        """Begin what can be begun; drop files whose time is over, now and then."""
        batches = await asyncio.to_thread(self._rows.open)
        now = self._clock()
        self._metrics.see(batches)
        there = {batch.id for batch in batches}
        self._paused = {id: until for id, until in self._paused.items() if id in there and until > now}
        for batch in batches:
            if len(self._working) >= AT_ONCE:
                break
            if batch.id not in self._working and batch.id not in self._paused and self._has_turn(batch, now):
                await self._begin(batch.id)
        if now - self._swept >= SWEEP_SECONDS:
            self._swept = now
            await asyncio.to_thread(self._sweep)
        self._metrics.keeps(*await asyncio.to_thread(self._files.totals))

    def _has_turn(self, batch: Batch, now: float) -> bool:
        """No other batch of its tenant is run here, or it only has to be ended."""
        if batch.status is Status.CANCELLING or batch.expires <= now:
            return True
        return all(work.batch.tenant != batch.tenant for work, _ in self._working.values())

    async def _begin(self, id: str) -> None:
        if (batch := await asyncio.to_thread(self._rows.claim, id, CLAIM_SECONDS)) is None:
            return
        if not self._alone and not await asyncio.to_thread(self._contents.has, batch.input_file):
            # It is on the disk of another server, which has not put it where all see it.
            await asyncio.to_thread(self._rows.release, id)
            self._paused[id] = self._clock() + PAUSE_SECONDS
            return
        work = Work(batch)
        self._working[id] = (work, asyncio.create_task(self._work(work)))

    async def _work(self, work: Work) -> None:
        id = work.batch.id
        keeping = asyncio.create_task(self._keep(work))
        try:
            await self._runner.run(work)
        except LoradockError as error:
            log.warning("%s is not run now: %s", id, error.message)
            self._paused[id] = self._clock() + PAUSE_SECONDS
        except Exception:  # whatever a batch brings about, the others are run
            log.exception("%s is not run now", id)
            self._paused[id] = self._clock() + PAUSE_SECONDS
        finally:
            keeping.cancel()
            try:
                await asyncio.shield(asyncio.to_thread(self._rows.release, id))
            except LoradockError as error:
                log.warning("the claim of %s ends by itself: %s", id, error.message)
            del self._working[id]
            self._wake.set()

    async def _keep(self, work: Work) -> None:
        """Renew the claim, and see whether the batch is to stop: it was cancelled, its time is over, or it is lost."""
        held_until = self._clock() + CLAIM_SECONDS
        while True:
            try:
                batch = await asyncio.to_thread(self._rows.claim, work.batch.id, CLAIM_SECONDS)
                work.lost = batch is None
                held_until = self._clock() + CLAIM_SECONDS
            except LoradockError as error:
                batch = work.batch
                work.lost = self._clock() > held_until
                log.warning("the claim of %s was not renewed: %s", work.batch.id, error.message)
            if batch is None or work.lost or batch.status is Status.CANCELLING or batch.expires <= self._clock():
                work.stop.set()
            if work.lost:
                return
            try:
                async with asyncio.timeout(RENEW_SECONDS):
                    await work.wake.wait()
            except TimeoutError:
                pass
            work.wake.clear()

    def _sweep(self) -> None:
        for id in self._files.expired():
            self._remove(id)
        self._contents.sweep(self._files.ids())
        self._rows.forget_before(self._clock() - KEPT_SECONDS)

    def _remove(self, id: str) -> None:
        self._contents.remove(id)
        self._files.remove(id)
