"""Jobs that other machines train: a worker fetches one over HTTP, tells of it, and brings back what it made.

A worker has the claim of its job as a server has, under a name of its own. What it brings (`worker_files`) is admitted
as what this server trains itself.
"""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.adapters.registry.work_table import WORKER
from serve.auth.auth import Caller
from serve.errors import BadRequest, Conflict
from serve.jobs.finetuning.job_rows import JobRows
from serve.jobs.finetuning.job_runner import JobRunner, Kind
from serve.jobs.finetuning.metrics import FineTuningMetrics
from serve.jobs.finetuning.objects import ACTIVE, OPEN, Job, Status
from serve.jobs.finetuning.schedule import Turns
from serve.jobs.finetuning.worker_files import WorkerFiles
from serve.jobs.schedule import CLAIM_SECONDS as HANDED_SECONDS
from serve.names import shown

log = logging.getLogger(__name__)

# A worker that has said nothing for so long has lost its job.
CLAIM_SECONDS = 60.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}")


@dataclass(frozen=True, slots=True)
class Offer:
    """What a worker gets: a job, or none. `missing` are bases that jobs wait for and it does not have, by their names;
    `ended` is what it keeps of jobs that are over."""

    job: Job | None
    missing: Mapping[str, str]
    ended: Collection[str]


class Workers:
    """`taken` says that workers may train here at all; `me` is this server's name."""

    def __init__(
        self,
        rows: JobRows,
        runner: JobRunner,
        files: WorkerFiles,
        turns: Turns,
        metrics: FineTuningMetrics,
        *,
        taken: bool,
        me: str,
    ) -> None:
        self._rows = rows
        self._runner = runner
        self.files = files
        self._turns = turns
        self._metrics = metrics
        self._taken = taken
        self._me = me
        self._claiming = threading.Lock()

    def claim(
        self, caller: Caller, worker: str, bases: Collection[str], kept: Collection[str], besides: Collection[str]
    ) -> Offer:
        """Claim the next job whose base has a digest in `bases`; prefer what is `kept` of earlier work, skip `besides`.

        Blocks.
        """
        rows = self._as(caller, worker)
        with self._claiming:  # else two workers at once would both find the same one, and one of them go without
            jobs = self._rows.open()
            missing = {}
            for job in sorted(jobs, key=lambda job: (job.id not in kept, self._turns.key(job))):
                if job.status not in (Status.QUEUED, Status.RUNNING) or job.id in besides:
                    continue
                if job.state.base_digest not in bases:
                    missing[job.asked.base] = job.state.base_digest
                    continue
                if self._runner.kind(job) is not Kind.TRAIN or not self._runner.can_read(job):
                    continue
                if claimed := rows.claim(job.id, CLAIM_SECONDS):
                    log.info("%s is trained by %s", job.id, worker)
                    self._turns.begun(job, time.time())
                    return Offer(_without_key(claimed), missing, self._over(kept, jobs))
        return Offer(None, missing, self._over(kept, jobs))

    def _over(self, kept: Collection[str], jobs: Collection[Job]) -> Collection[str]:
        there = {job.id for job in jobs if job.status in OPEN}
        return [id for id in kept if id not in there]

    def renew(self, caller: Caller, worker: str, id: str) -> None:
        """It works on the job still. Blocks."""
        rows = self._as(caller, worker)
        self._held(rows.held(id), id)
        self._held(rows.claim(id, CLAIM_SECONDS), id)

    def launch(self, caller: Caller, worker: str, id: str) -> Job:
        """Its process is about to start. Blocks."""
        return self._held(self._as(caller, worker).launch(id), id)

    def advance(
        self,
        caller: Caller,
        worker: str,
        id: str,
        lines: Sequence[Mapping[str, Any]],
        seconds: float,
        settled: Mapping[str, Any],
    ) -> Job:
        """What steps measured since the last time. Blocks."""
        rows = self._as(caller, worker)
        before = self._held(rows.held(id), id)
        job = self._held(rows.advance(id, lines, seconds, settled), id)
        self._metrics.trained(job.state.tokens - before.state.tokens, seconds)
        return job

    def note(self, caller: Caller, worker: str, id: str, message: str, level: str) -> None:
        """An event. Blocks."""
        rows = self._as(caller, worker)
        self._held(rows.held(id), id)
        rows.note(id, message, level)

    def fail(
        self, caller: Caller, worker: str, id: str, code: str, message: str, param: str | None, also: tuple[str, ...]
    ) -> None:
        """It ends with this error. Blocks."""
        rows = self._as(caller, worker)
        job = self._held(rows.held(id), id)
        if rows.fail(id, code, message, param, also=also):
            self._runner.ended(job, Status.FAILED)

    def release(self, caller: Caller, worker: str, id: str) -> None:
        """It works on the job no more; another one may. Blocks."""
        self._as(caller, worker).release(id)

    async def file(self, caller: Caller, worker: str, id: str, name: str) -> Path:
        """Where a file that the job is trained with can be read."""
        job = self._held(await asyncio.to_thread(self._as(caller, worker).held, id), id)
        return await self.files.find(job, name)

    async def put(
        self, caller: Caller, worker: str, id: str, name: str, stream: AsyncIterator[bytes], stated: int
    ) -> None:
        """Keep a file of the result; a second one of its name takes its place."""
        job = self._held(await asyncio.to_thread(self._as(caller, worker).held, id), id)
        async with self.files.received(job, name, stream, stated):
            # Meanwhile the job may have ended, or be another worker's.
            self._held(await asyncio.to_thread(self._as(caller, worker).held, id), id)

    def done(self, caller: Caller, worker: str, id: str) -> None:
        """The result is here, whole: this server admits it from now on. Blocks."""
        rows = self._as(caller, worker)
        job = self._held(rows.held(id), id)
        passed = self.files.lay(job)
        if not rows.hand_over(id, self._me, HANDED_SECONDS):
            raise _lost(id)
        self.files.drop(passed)
        log.info("%s was trained by %s", id, worker)

    def _as(self, caller: Caller, worker: str) -> JobRows:
        """The jobs as this worker has them; BadRequest where no machine but this one trains."""
        if not self._taken:
            raise BadRequest(
                "this server trains its jobs itself: its operator lets workers do it by finetune_on, workers or any"
            )
        if not _NAME.fullmatch(worker):
            raise BadRequest(
                f"worker takes a name of up to 31 letters, digits, dots and dashes, not {shown(worker)}", param="worker"
            )
        self._metrics.heard_of(worker)
        return self._rows.of(f"{WORKER}{caller.key}:{worker}")

    def _held(self, job: Job | None, id: str) -> Job:
        """The job, which is the worker's."""
        if job is None or job.status not in ACTIVE:
            raise _lost(id)
        return _without_key(job)


def _lost(id: str) -> Conflict:
    return Conflict(f"{shown(id)} is not this worker's: it was stopped, has ended, or is another one's", code="lost")


def _without_key(job: Job) -> Job:
    """Who asked for it, and what they call it, is nothing to whoever trains it."""
    return replace(job, asked=replace(job.asked, key="", who="", metadata=None))
