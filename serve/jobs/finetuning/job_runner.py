"""Runs one job from where it stands to its end: its files are checked, its adapter is trained and admitted.

Where it stands is what the database and its folder hold, so that a restart goes on there. Another server, which has no
such folder, trains from the beginning.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, TypeVar

from serve.adapters.byte_ledger import Kind as Bytes
from serve.adapters.byte_ledger import Room, size_of
from serve.engine.fleet import Fleet
from serve.errors import (
    AdapterRejected,
    BadRequest,
    ConfigError,
    EngineUnavailable,
    LoradockError,
    NotFound,
    OutOfSpace,
    QuotaExceeded,
)
from serve.events import Events, JobEnded
from serve.jobs.batches.files import Files
from serve.jobs.batches.objects import StoredFile
from serve.jobs.finetuning.admission import Admission
from serve.jobs.finetuning.job_folder import JobFolder
from serve.jobs.finetuning.job_folders import JobFolders
from serve.jobs.finetuning.job_rows import JobRows, metrics_of
from serve.jobs.finetuning.objects import RESULTS, Checkpoint, Job, Status
from serve.jobs.finetuning.trainer import Failed, Trainer
from serve.jobs.finetuning.training_process import CannotCheck, Checked, TrainingProcess
from serve.models.checkpoint import digest_of, folder_of
from serve.models.gguf.checkpoint import to_train
from serve.names import shown

log = logging.getLogger(__name__)

Result = TypeVar("Result")
# Examples to train on, as OpenAI asks for.
FEWEST = 10
# Ends of epochs that become versions, the last one included.
CHECKPOINTS = 3
# Problems of a file are events up to so many.
TOLD = 20
# Where each file is spoken of: its code, its name, its field.
_FILES = (
    ("invalid_training_file", "training file", "training_file"),
    ("invalid_validation_file", "validation file", "validation_file"),
)


class Kind(StrEnum):
    """What a job waits for. A server does one of each at a time."""

    CHECK = "check"
    TRAIN = "train"
    ADMIT = "admit"


@dataclass(slots=True)
class Work:
    """A job that this server runs. `stop` ends its process: it was paused or cancelled, or is another server's."""

    job: Job
    kind: Kind
    stop: threading.Event = field(default_factory=threading.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class JobRunner:
    def __init__(
        self,
        rows: JobRows,
        folders: JobFolders,
        files: Files,
        process: TrainingProcess,
        trainer: Trainer,
        admission: Admission,
        fleet: Fleet,
        events: Events,
    ) -> None:
        self._rows = rows
        self.folders = folders
        self._files = files
        self.process = process
        self._trainer = trainer
        self._admission = admission
        self._fleet = fleet
        self._events = events
        # A process ends with the thread that starts it, so these last.
        self._threads = ThreadPoolExecutor(len(Kind), "training")

    def can_read(self, job: Job) -> bool:
        """Its files are here, or where they can be fetched. Blocks."""
        return all(map(self._files.contents.has, filter(None, (job.training_file, job.validation_file))))

    def kind(self, job: Job) -> Kind:
        """What is next for it. Blocks."""
        if job.status is Status.VALIDATING:
            return Kind.CHECK
        return Kind.ADMIT if self.folders.folder(job.id).adapter else Kind.TRAIN

    async def run(self, work: Work) -> None:
        """Until its files are checked, or to its end, or until it is stopped."""
        try:
            if work.kind is Kind.CHECK:
                await self._stoppable(work, self._validate, work.job, work)
            elif (work.kind is Kind.ADMIT or await self._train(work.job, work)) and (
                admitting := await asyncio.to_thread(self._rows.admit, work.job.id)
            ):
                await self._admit(admitting)
        except Failed as failed:
            await self._fail(work.job, failed)
        except OutOfSpace as full:
            await self._fail(work.job, Failed("insufficient_storage", full.message))
        except OSError as error:
            why = f"the files of the job cannot be written or read: {error.strerror or error}"
            await self._fail(work.job, Failed("storage_error", why))

    async def _stoppable(self, work: Work, run: Callable[..., Result], *arguments: Any) -> Result:
        """What this answers on the thread of the processes; a server that ends stops its process first."""
        running = asyncio.get_running_loop().run_in_executor(self._threads, run, *arguments)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            work.stop.set()
            await asyncio.gather(running, return_exceptions=True)
            raise

    def ended(self, job: Job, status: Status) -> None:
        """A job is at its end: whoever waits for it is told."""
        self._events.publish(JobEnded(job.id, job.tenant, status.value))

    async def _fail(self, job: Job, failed: Failed) -> None:
        fail = self._rows.fail
        if await asyncio.to_thread(fail, job.id, failed.code, failed.message, failed.param, also=failed.also):
            self.ended(job, Status.FAILED)
            await asyncio.to_thread(self.folders.remove, job.id)

    # Before the training

    def _validate(self, job: Job, work: Work) -> None:
        digests, counts = [], []
        model = _folder(job.asked.base_model)
        for id, (code, name, param) in zip((job.training_file, job.validation_file), _FILES, strict=True):
            if id is None:
                continue
            try:
                path = self._files.contents.path(id)
                fewest = FEWEST if param == "training_file" else 1
                checked = self.process.check(path, job.asked.method, fewest, model, work.stop)
            except NotFound as gone:
                raise Failed(code, gone.message, param) from gone
            except CannotCheck as error:
                raise Failed("training_unavailable", error.message) from error
            if checked is None:
                return
            if checked.problem_count:
                raise Failed(code, _refusal(name, checked), param, _sentences(checked))
            counts.append(checked.examples)
            with path.open("rb") as file:
                digests.append(file_digest(file, "sha256").hexdigest())
        base = _digest(job.asked.base_model)
        data = digests[0] if len(digests) == 1 else sha256("\n".join(digests).encode()).hexdigest()
        self._rows.validated(job.id, examples=counts[0], base_digest=base, data_digest=data)

    def _check_base(self, job: Job) -> None:
        """The base is the one that the job was made for."""
        asked = job.asked
        try:
            serves = self._fleet.get(asked.base).model
        except LoradockError as gone:
            raise Failed("base_model_changed", f"the base {asked.base} is not served any more") from gone
        if _digest(serves) != job.state.base_digest:
            raise Failed(
                "base_model_changed",
                f"the base {asked.base} is another model than when the job was made: make a new job for it",
                "model",
            )

    async def _parent(self, job: Job) -> Path | None:
        if not job.asked.parent or await asyncio.to_thread((self.folders.folder(job.id).path / "parent").is_dir):
            return None
        try:
            return await self._admission.store.bring(job.asked.parent_digest)
        except NotFound as gone:
            raise Failed("model_not_found", f"{job.asked.parent}, to go on from, was removed meanwhile") from gone

    # The training

    async def _train(self, job: Job, work: Work) -> bool:
        """Whether it came to its end, and well."""
        try:
            self._admission.caller(job)
        except LoradockError as error:
            raise Failed("invalid_api_key", error.message) from error
        await asyncio.to_thread(self._check_base, job)
        return await self._stoppable(work, self._trained, job, await self._parent(job), work)

    def _trained(self, job: Job, parent: Path | None, work: Work) -> bool:
        folder = self.folders.folder(job.id)
        self._prepare(job, folder, parent)
        return self._trainer.run(job, folder, work.stop)

    def _prepare(self, job: Job, folder: JobFolder, parent: Path | None) -> None:
        self._check_room(job, parent)
        asked = job.asked
        try:
            train = self._files.contents.path(job.training_file)
            validation = self._files.contents.path(job.validation_file) if job.validation_file else None
            folder.prepare(job, _to_train(asked.base_model), train, validation, parent)
        except NotFound as gone:
            raise Failed("invalid_training_file", gone.message) from gone

    def _check_room(self, job: Job, parent: Path | None) -> None:
        """OutOfSpace or Failed, if the tenant has no room for what the folder has now and the adapter to go on from."""
        self.folders.count(job)
        try:
            self.folders.ledger.check(job.tenant, Bytes.TRAINING, size_of(parent) if parent else 0)
        except QuotaExceeded as full:
            raise Failed(full.code or "byte_limit_exceeded", full.message) from full

    # After it

    async def _admit(self, job: Job) -> None:
        folder = self.folders.folder(job.id)
        adapter = await asyncio.to_thread(lambda: folder.adapter)
        assert adapter is not None
        await asyncio.to_thread(self._check_base, job)
        settled = await asyncio.to_thread(folder.settled)
        validation = await asyncio.to_thread(folder.validation)
        try:
            await self._admission.try_out(job, adapter)
            # First, so that its number is the next one; the versions of earlier epochs stand behind it.
            model = await self._admission.admit(job, adapter, settled, final=True, checks=validation)
            checkpoints = await self._checkpoints(job, folder, settled)
        except (EngineUnavailable, OutOfSpace):
            raise
        except LoradockError as error:
            problems = tuple(getattr(error, "problems", ())[:TOLD])
            code = "model_rejected" if isinstance(error, AdapterRejected | BadRequest) else error.code or "not_admitted"
            message = f"The model was trained, and is not admitted: {error.message}"
            raise Failed(code, message, also=problems) from error
        rows = await asyncio.to_thread(self._checkpoint_rows, job, folder, checkpoints, model)
        with self.folders.ledger.room(job.tenant, Bytes.FILES) as room:  # until the file has its row
            result = await asyncio.to_thread(self._results, job, folder, room)
            succeeded = await asyncio.to_thread(self._rows.succeed, job.id, model, result, rows, settled)
        if succeeded:
            self.ended(job, Status.SUCCEEDED)
            await asyncio.to_thread(self.folders.remove, job.id)

    async def _checkpoints(self, job: Job, folder: JobFolder, settled: dict[str, object]) -> dict[int, str]:
        """The names of the versions that earlier epochs become, by their steps."""
        there = await asyncio.to_thread(folder.checkpoints)
        *earlier, _ = sorted(there)[-CHECKPOINTS:] or [0]
        names = {step: await self._admission.admitted(job, there[step], settled) for step in earlier}
        return {step: name for step, name in names.items() if name}

    def _checkpoint_rows(self, job: Job, folder: JobFolder, names: dict[int, str], model: str) -> list[Checkpoint]:
        """Of the earlier epochs with these names, and of the last step."""
        now = time.time()
        last = 0
        measured = {}
        for line in folder.lines():
            if line["step"] in names:
                measured[line["step"]] = metrics_of(line)
            last, at_last = line["step"], line
        if last:
            names, measured = {**names, last: model}, {**measured, last: metrics_of(at_last)}
        return [Checkpoint(job.id, step, now, name, measured.get(step, {})) for step, name in names.items()]

    def _results(self, job: Job, folder: JobFolder, room: Room) -> StoredFile:
        """What each step measured, as a file. Written again after a kill, it is the same one."""
        id = "file-" + sha256(f"{job.id} results".encode()).hexdigest()[:24]
        self.folders.ledger.check_disk(job.tenant)
        nbytes = self._files.compose(id, room.taken(folder.results()))
        now = time.time()
        expires = now + self._files.limits.file_seconds
        return StoredFile(id, job.tenant, job.asked.who, RESULTS, "step_metrics.csv", nbytes, now, expires)


def _folder(model: str) -> Path:
    try:
        return folder_of(model)
    except ConfigError as error:
        raise Failed("base_model_changed", error.message) from error


def _to_train(model: str) -> Path:
    try:
        return to_train(_folder(model))
    except ConfigError as error:
        raise Failed("base_model_changed", error.message) from error


def _digest(model: str) -> str:
    try:
        return digest_of(model)
    except (ConfigError, OSError) as error:
        raise Failed("base_model_changed", f"the base model cannot be read: {shown(error)}", "model") from error


def _refusal(name: str, checked: Checked) -> str:
    return f"The job failed due to an invalid {name}. {checked.message or _sentences(checked)[0]}"


def _sentences(checked: Checked) -> tuple[str, ...]:
    return tuple(problem.sentence for problem in checked.problems[:TOLD])
