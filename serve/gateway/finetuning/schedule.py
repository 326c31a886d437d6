"""Which job this server runs: one at a time, of the tenant whose last one is longest ago, claimed from the database."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable

from serve.gateway.batches.file_bytes import FileBytes
from serve.gateway.claims import SWEEP_SECONDS, Schedule
from serve.gateway.finetuning.job_rows import JobRows
from serve.gateway.finetuning.job_runner import JobRunner, Work
from serve.gateway.finetuning.metrics import FineTuningMetrics
from serve.gateway.finetuning.objects import ACTIVE, Job, Status

# Jobs at their end are listed for so long.
KEPT_SECONDS = 90 * 86_400.0


class JobSchedule(Schedule[Job, Work]):
    """The schedule of fine-tuning."""

    what = "fine-tuning jobs"

    def __init__(
        self,
        rows: JobRows,
        contents: FileBytes,
        runner: JobRunner,
        metrics: FineTuningMetrics,
        *,
        alone: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(rows, runner.run, alone=alone, clock=clock)
        self._rows, self._contents, self._runner, self._metrics = rows, contents, runner, metrics
        # When a job of a tenant was begun last, here.
        self._turns: dict[str, float] = {}

    async def round(self) -> None:
        """Begin a job, if none runs here; drop what is left of others, now and then."""
        jobs = await asyncio.to_thread(self._rows.open)
        now = self._clock()
        self._metrics.see(jobs)
        ready = [job for job in jobs if job.status in ACTIVE and self._is_free(job.id)]
        for job in sorted(ready, key=self._turn):
            if self._working:
                break
            if claimed := await self._claim(job.id):
                self._turns[job.tenant] = now
                self._start(job.id, Work(claimed))
        if now - self._swept >= SWEEP_SECONDS:
            self._swept = now
            await asyncio.to_thread(self._sweep, {job.id for job in jobs} | self._working.keys())

    def _turn(self, job: Job) -> tuple[bool, float, float]:
        """What was begun here goes on before another one begins."""
        begun = job.status is Status.RUNNING
        return (not begun, self._turns.get(job.tenant, 0.0), job.created)

    def _can_read(self, job: Job) -> bool:
        return all(map(self._contents.has, filter(None, (job.training_file, job.validation_file))))

    def _renewed(self, work: Work, job: Job | None, lost: bool) -> None:
        if lost:
            work.stop.set()

    def _ended(self) -> None:
        self._swept = 0.0  # its folder may go

    def _sweep(self, kept: set[str]) -> None:
        """Drop the folders of jobs that are at their end, and jobs that ended long ago."""
        if self._runner.root.is_dir():
            for folder in self._runner.root.iterdir():
                if folder.name not in kept:
                    shutil.rmtree(folder, ignore_errors=True)
        self._rows.forget_before(self._clock() - KEPT_SECONDS)
