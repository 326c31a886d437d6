"""Jobs that other machines train: a worker fetches one over HTTP, tells of it, and brings back what it made.

A worker has the claim of its job as a server has, under a name of its own. What it brings is laid into the job's folder
here, and is admitted as what this server trains itself.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.adapters.adapter import FILES
from serve.adapters.byte_ledger import Kind as Bytes
from serve.adapters.registry.work_table import WORKER
from serve.adapters.store import Store
from serve.adapters.untrusted import create, write
from serve.auth.auth import Caller
from serve.errors import BadRequest, Conflict, NotFound, TooLarge
from serve.files import fsync_tree, rename
from serve.jobs.batches.file_bytes import FileBytes
from serve.jobs.finetuning.job_folder import JobFolder
from serve.jobs.finetuning.job_rows import JobRows
from serve.jobs.finetuning.job_runner import JobRunner, Kind
from serve.jobs.finetuning.metrics import FineTuningMetrics
from serve.jobs.finetuning.objects import ACTIVE, OPEN, Job, Status
from serve.jobs.finetuning.schedule import Turns
from serve.jobs.schedule import CLAIM_SECONDS as HANDED_SECONDS
from serve.names import shown

log = logging.getLogger(__name__)

# A worker that has said nothing for so long has lost its job.
CLAIM_SECONDS = 60.0
# A result has a few; another worker may have brought others before.
MOST_CHECKPOINTS = 10
# Of what a worker brings besides adapters.
_MOST_BYTES = {"progress.jsonl": 256 << 20, "settings.json": 64 << 10}
TRAINING = "training.jsonl"
VALIDATION = "validation.jsonl"
PARENT = "parent/"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}")
_RESULT = re.compile(
    rf"(?:adapter|checkpoints/step-[0-9]{{6,9}})/(?:{'|'.join(map(re.escape, FILES))})|progress\.jsonl|settings\.json"
)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a worker gets: a job, or none. `missing` are bases that jobs wait for and it does not have, by their names;
    `ended` is what it keeps of jobs that are over."""

    job: Job | None
    missing: Mapping[str, str]
    ended: Collection[str]


class Workers:
    """`me` is this server's name; `max_bytes` is what a file of a result may have."""

    def __init__(
        self,
        rows: JobRows,
        contents: FileBytes,
        store: Store,
        runner: JobRunner,
        turns: Turns,
        metrics: FineTuningMetrics,
        *,
        taken: bool,
        me: str,
        max_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rows = rows
        self._contents = contents
        self._store = store
        self._runner = runner
        self._turns, self._metrics = turns, metrics
        self._taken = taken
        self._me = me
        self._max_bytes = max_bytes
        self._clock = clock
        self._claiming = threading.Lock()

    def claim(
        self, caller: Caller, worker: str, bases: Collection[str], kept: Collection[str], besides: Collection[str]
    ) -> Offer:
        """The job whose turn it is among those on the `bases` with these digests: before others what it has `kept`
        of earlier work, and none of those `besides`. Blocks."""
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
                    self._turns.begun(job, self._clock())
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
        files = {TRAINING: job.training_file, VALIDATION: job.validation_file}
        if file := files.get(name):
            return await asyncio.to_thread(self._contents.path, file)
        if job.asked.parent and name in {PARENT + each for each in FILES}:
            return await self._store.bring(job.asked.parent_digest) / name.removeprefix(PARENT)
        raise NotFound(f"{id} is trained without {shown(name)}", param="name")

    async def put(
        self, caller: Caller, worker: str, id: str, name: str, stream: AsyncIterator[bytes], stated: int
    ) -> None:
        """Keep a file of the result; a second one of its name takes its place."""
        job = self._held(await asyncio.to_thread(self._as(caller, worker).held, id), id)
        if not _RESULT.fullmatch(name):
            raise BadRequest(f"{shown(name)} is no file of a result", param="name")
        room = self._runner.room(job)
        await asyncio.to_thread(self._store.ledger.check, job.tenant, Bytes.TRAINING, stated)
        target, most = self._incoming(id) / name, self._most(name)
        await asyncio.to_thread(self._check_checkpoints, target)
        part = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
        await asyncio.to_thread(target.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
        sink = await asyncio.to_thread(create, part)
        try:
            with sink:
                nbytes = 0
                async for chunk in stream:
                    nbytes += len(chunk)
                    if nbytes > most:
                        raise TooLarge(f"{name} is above {most} bytes, the most that it may have")
                    await asyncio.to_thread(room.take, len(chunk))
                    await asyncio.to_thread(write, sink, chunk)
            # Meanwhile the job may have ended, or be another worker's.
            self._held(await asyncio.to_thread(self._as(caller, worker).held, id), id)
            if self._contents.is_shared:  # the next request may meet another server
                await asyncio.to_thread(self._contents.pass_on, _passed_as(id, name), part)
            else:
                await asyncio.to_thread(part.replace, target)
        finally:
            await asyncio.to_thread(part.unlink, missing_ok=True)
            await asyncio.to_thread(self._runner.count, job)

    def done(self, caller: Caller, worker: str, id: str) -> None:
        """The result is here, whole: this server admits it from now on. Blocks."""
        rows = self._as(caller, worker)
        job = self._held(rows.held(id), id)
        folder = self._runner.folder(id)
        received: list[str] = []
        if folder.adapter is None:
            incoming = self._incoming(id)
            if self._contents.is_shared:
                received = self._received(id, incoming)
                self._runner.count(job)
            if not all((incoming / "adapter" / name).is_file() for name in FILES):
                raise BadRequest(
                    f"the result of {id} is not whole here: send {' and '.join(FILES)} below adapter/; where several "
                    "servers without `blobs` have one address, give the worker the address of one of them"
                )
            fsync_tree(incoming)
            for name in ("checkpoints", "progress.jsonl", "settings.json", "adapter"):  # the adapter says that all is
                _laid(incoming / name, folder.path / name)
        if not rows.hand_over(id, self._me, HANDED_SECONDS):
            raise _lost(id)
        for passed in received:
            self._contents.drop_passing(passed)
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

    def _most(self, name: str) -> int:
        """Bytes of a file of a result."""
        return min(self._max_bytes, _MOST_BYTES.get(name, self._max_bytes))

    @staticmethod
    def _check_checkpoints(target: Path) -> None:
        """TooLarge for one more than a job may have here."""
        folder = target.parent
        if folder.parent.name != "checkpoints" or folder.is_dir() or not folder.parent.is_dir():
            return
        if len(list(folder.parent.iterdir())) >= MOST_CHECKPOINTS:
            raise TooLarge(
                f"a result has {MOST_CHECKPOINTS} checkpoints at most: bring the last ones alone", param="name"
            )

    def _received(self, id: str, incoming: Path) -> list[str]:
        """Bring here what was sent to any server: as what it was passed on."""
        found = []

        def receive(*names: str) -> None:
            for name in filter(_RESULT.fullmatch, names):
                if self._contents.receive(passed := _passed_as(id, name), incoming / name):
                    found.append(passed)

        receive("progress.jsonl", "settings.json", *(f"adapter/{name}" for name in FILES))
        checkpoints = {str(line["checkpoint"]) for line in JobFolder(incoming).lines() if line.get("checkpoint")}
        receive(*(f"{checkpoint}/{name}" for checkpoint in sorted(checkpoints)[-MOST_CHECKPOINTS:] for name in FILES))
        return found

    def _incoming(self, id: str) -> Path:
        return self._runner.folder(id).path / "incoming"


def _passed_as(id: str, name: str) -> str:
    """A file of a result, where all servers look."""
    return f"{id}-{name.replace('/', '-')}"


def _lost(id: str) -> Conflict:
    return Conflict(f"{shown(id)} is not this worker's: it was stopped, has ended, or is another one's", code="lost")


def _without_key(job: Job) -> Job:
    """Who asked for it, and what they call it, is nothing to whoever trains it."""
    return replace(job, asked=replace(job.asked, key="", who="", metadata=None))


def _laid(source: Path, target: Path) -> None:
    """In the place of what is there."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if source.exists():
        rename(source, target)
