"""Which jobs this server runs: it trains one at a time, of the tenant whose last one is longest ago."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from serve.jobs.finetuning.job_rows import JobRows
from serve.jobs.finetuning.job_runner import JobRunner, Kind, Work
from serve.jobs.finetuning.metrics import FineTuningMetrics
from serve.jobs.finetuning.objects import ACTIVE, Job, Status
from serve.jobs.schedule import SWEEP_SECONDS, Schedule


class Turns:
    """Whose job is trained next, here or by a worker of this server."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}

    def key(self, job: Job) -> tuple[bool, float, float]:
        """The least one is next: what was begun goes on before another one begins."""
        return (job.status is not Status.RUNNING, self._last.get(job.tenant, 0.0), job.created)

    def begun(self, job: Job, now: float) -> None:
        self._last[job.tenant] = now


class JobSchedule(Schedule[Job, Work]):
    """The schedule of fine-tuning; `trains` is False where other machines do."""

    what = "fine-tuning jobs"

    def __init__(
        self,
        rows: JobRows,
        runner: JobRunner,
        metrics: FineTuningMetrics,
        *,
        alone: bool,
        turns: Turns | None = None,
        trains: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(rows, runner.run, alone=alone, clock=clock)
        self._rows = rows
        self._runner = runner
        self._metrics = metrics
        self._turns, self.trains = turns or Turns(), trains

    async def round(self) -> None:
        """Begin what has its turn; drop what is left of others, now and then."""
        jobs = await asyncio.to_thread(self._rows.open)
        now = self._clock()
        self._metrics.see(jobs)
        ready = [job for job in jobs if job.status in ACTIVE and self._is_free(job.id)]
        for job in sorted(ready, key=self._turns.key):
            kind = await asyncio.to_thread(self._runner.kind, job)
            busy = {work.kind for work, _ in self._working.values()}
            if kind in busy or (kind is Kind.TRAIN and not self.trains):
                continue
            if claimed := await self._claim(job.id):
                if kind is Kind.TRAIN:
                    self._turns.begun(job, now)
                self._start(job.id, Work(claimed, kind))
        if now - self._swept >= SWEEP_SECONDS:
            self._swept = now
            await asyncio.to_thread(self._sweep, {job.id for job in jobs} | self._working.keys())

    def _can_read(self, job: Job) -> bool:
        return self._runner.can_read(job)

    def _renewed(self, work: Work, job: Job | None, lost: bool) -> None:
        if lost:
            work.stop.set()

    def _ended(self) -> None:
        self._swept = 0.0  # its folder may go

    def _sweep(self, kept: set[str]) -> None:
        """Drop the folders of jobs that are at their end, and jobs that ended long ago."""
        self._runner.folders.sweep(kept)
        self._rows.sweep()
