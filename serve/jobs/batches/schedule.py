"""Which batches this server runs: one of each tenant at a time, the oldest first, claimed from the database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from serve.jobs.batches.answers import AnswerFiles
from serve.jobs.batches.batch_rows import BatchRows
from serve.jobs.batches.batch_runner import BatchRunner, Work
from serve.jobs.batches.files import Files
from serve.jobs.batches.metrics import BatchMetrics
from serve.jobs.batches.objects import Batch, Status
from serve.jobs.schedule import SWEEP_SECONDS, Schedule

# Batches that one server runs at a time.
AT_ONCE = 16


class BatchSchedule(Schedule[Batch, Work]):
    """The schedule of batches."""

    what = "batches"

    def __init__(
        self,
        rows: BatchRows,
        files: Files,
        answers: AnswerFiles,
        runner: BatchRunner,
        metrics: BatchMetrics,
        *,
        alone: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(rows, runner.run, alone=alone, clock=clock)
        self._rows = rows
        self._files = files
        self._answers = answers
        self._runner, self._metrics = runner, metrics

    async def round(self) -> None:
        """Begin what can be begun; drop files whose time is over, now and then."""
        batches = await asyncio.to_thread(self._rows.open)
        now = self._clock()
        self._metrics.see(batches)
        for batch in batches:
            if len(self._working) >= AT_ONCE:
                break
            if self._is_free(batch.id) and self._has_turn(batch, now) and (claimed := await self._claim(batch.id)):
                self._start(batch.id, Work(claimed))
        if now - self._swept >= SWEEP_SECONDS:
            self._swept = now
            await asyncio.to_thread(self._sweep)
        self._metrics.keeps(*await asyncio.to_thread(self._files.rows.totals))

    def _has_turn(self, batch: Batch, now: float) -> bool:
        """No other batch of its tenant is run here, or it only has to be ended."""
        if batch.status is Status.CANCELLING or batch.expires <= now:
            return True
        return all(work.batch.tenant != batch.tenant for work, _ in self._working.values())

    def _can_read(self, batch: Batch) -> bool:
        return self._files.contents.has(batch.input_file)

    def _renewed(self, work: Work, batch: Batch | None, lost: bool) -> None:
        """It stops when it was cancelled, when its time is over, or when another server has it."""
        work.lost = lost
        batch = batch or work.batch
        if lost or batch.status is Status.CANCELLING or batch.expires <= self._clock():
            work.stop.set()

    def _sweep(self) -> None:
        self._files.sweep()
        self._answers.sweep()
        self._rows.sweep()
