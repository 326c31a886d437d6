"""Which job this server runs: one at a time, of the tenant whose last one is longest ago, claimed from the database.

A claim ends by itself: a server that was killed keeps the others from its job for `CLAIM_SECONDS`. A server that
shares its registry with nobody takes its own claim back when it starts.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable

from serve.errors import LoradockError
from serve.gateway.finetuning.job_rows import JobRows
from serve.gateway.finetuning.job_runner import JobRunner, Work
from serve.gateway.finetuning.metrics import FineTuningMetrics
from serve.gateway.finetuning.objects import ACTIVE, Job, Status

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
CLAIM_SECONDS, RENEW_SECONDS = 30.0, 5.0
# A job that cannot be run now is looked at again after this.
PAUSE_SECONDS = 30.0
SWEEP_SECONDS = 300.0
# Jobs at their end are listed for so long.
KEPT_SECONDS = 90 * 86_400.0


class JobSchedule:
    """For one event loop. `alone` says that no other server shares the registry."""

    def __init__(
        self,
        rows: JobRows,
        runner: JobRunner,
        metrics: FineTuningMetrics,
        *,
        alone: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rows, self._runner, self._metrics, self._alone, self._clock = rows, runner, metrics, alone, clock
        self._wake = asyncio.Event()
        self._work: Work | None = None
        self._task: asyncio.Task[None] | None = None
        self._paused: dict[str, float] = {}
        # When a job of a tenant was begun last, here.
        self._turns: dict[str, float] = {}
        self._swept = 0.0

    def wake(self, id: str | None = None) -> None:
        """A job came, or this one was cancelled, paused or resumed: look now."""
        if self._work and self._work.job.id == id:
            self._work.wake.set()
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled; the job's process has saved what it can by then."""
        if self._alone:
            await asyncio.to_thread(self._rows.release)
        try:
            while True:
                try:
                    await self.round()
                except LoradockError as error:
                    log.warning("fine-tuning jobs are not looked at now: %s", error.message)
                try:
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
        finally:
            if self._task:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    async def round(self) -> None:
        """Begin a job, if none runs here; drop what is left of others, now and then."""
        jobs = await asyncio.to_thread(self._rows.open)
        now = self._clock()
        self._metrics.see(jobs)
        self._paused = {id: until for id, until in self._paused.items() if until > now}
        ready = [job for job in jobs if job.status in ACTIVE and job.id not in self._paused]
        for job in sorted(ready, key=self._turn):
            if self._work is not None:
                break
            await self._begin(job, now)
        if now - self._swept >= SWEEP_SECONDS:
            self._swept = now
            await asyncio.to_thread(self._sweep, {job.id for job in jobs})

    def _turn(self, job: Job) -> tuple[bool, float, float]:
        """What was begun here goes on before another one begins."""
        begun = job.status is Status.RUNNING
        return (not begun, self._turns.get(job.tenant, 0.0), job.created)

    async def _begin(self, job: Job, now: float) -> None:
        claimed = await asyncio.to_thread(self._rows.claim, job.id, CLAIM_SECONDS)
        if claimed is None:
            return
        self._turns[job.tenant] = now
        self._work = Work(claimed)
        self._task = asyncio.create_task(self._run(self._work))

    async def _run(self, work: Work) -> None:
        id = work.job.id
        keeping = asyncio.create_task(self._keep(work))
        try:
            await self._runner.run(work)
        except LoradockError as error:
            log.warning("%s is not run now: %s", id, error.message)
            self._paused[id] = self._clock() + PAUSE_SECONDS
        except Exception:  # whatever a job brings about, the others are run
            log.exception("%s is not run now", id)
            self._paused[id] = self._clock() + PAUSE_SECONDS
        finally:
            keeping.cancel()
            try:
                await asyncio.shield(asyncio.to_thread(self._rows.release, id))
            except LoradockError as error:
                log.warning("the claim of %s ends by itself: %s", id, error.message)
            self._work = self._task = None
            self._wake.set()
            self._swept = 0.0  # its folder may go

    async def _keep(self, work: Work) -> None:
        """Renew the claim, and see whether the job is to stop."""
        held_until = self._clock() + CLAIM_SECONDS
        while True:
            try:
                lost = await asyncio.to_thread(self._rows.claim, work.job.id, CLAIM_SECONDS) is None
                held_until = self._clock() + CLAIM_SECONDS
            except LoradockError as error:
                lost = self._clock() > held_until
                log.warning("the claim of %s was not renewed: %s", work.job.id, error.message)
            if lost:
                work.stop.set()
                return
            try:
                async with asyncio.timeout(RENEW_SECONDS):
                    await work.wake.wait()
            except TimeoutError:
                pass
            work.wake.clear()

    def _sweep(self, open_jobs: set[str]) -> None:
        """Drop the folders of jobs that are at their end, and jobs that ended long ago."""
        if self._runner.root.is_dir():
            running = self._work.job.id if self._work else None
            for folder in self._runner.root.iterdir():
                if folder.name not in open_jobs and folder.name != running:
                    shutil.rmtree(folder, ignore_errors=True)
        self._rows.forget_before(self._clock() - KEPT_SECONDS)
