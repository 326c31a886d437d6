"""Runs one job from where it stands to its end: its files are checked, its adapter is trained and admitted.

Where it stands is what the database and its folder hold, so that a restart goes on there. Another server, which has no
such folder, trains from the beginning.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, TypeVar

from serve.adapters.store import Store
from serve.adapters.untrusted import write
from serve.errors import (
    AdapterRejected,
    BadRequest,
    ConfigError,
    EngineUnavailable,
    LoradockError,
    NotFound,
    OutOfSpace,
)
from serve.gateway.batches.file_bytes import FileBytes
from serve.gateway.batches.objects import StoredFile
from serve.gateway.finetuning.admission import Admission
from serve.gateway.finetuning.job_folder import JobFolder
from serve.gateway.finetuning.job_rows import JobRows, metrics_of
from serve.gateway.finetuning.metrics import FineTuningMetrics
from serve.gateway.finetuning.objects import RESULTS, Checkpoint, Job, Limits, Status
from serve.gateway.finetuning.training_process import CannotCheck, Checked, Ended, TrainingProcess, Why
from serve.models.checkpoint import digest_of, folder_of
from serve.names import shown

log = logging.getLogger(__name__)

Result = TypeVar("Result")
# Starts of a process in a row that came to no new step: then it is given up.
LAUNCHES = 8
AGAIN_SECONDS = 1.0
# Examples to train on, as OpenAI asks for.
FEWEST = 10
# Ends of epochs that become versions, the last one included.
CHECKPOINTS = 3
# Progress is written down so often; problems of a file are events up to so many.
WRITE_SECONDS, TOLD = 2.0, 20
# Where each file is spoken of: its code, its name, its field.
_FILES = (
    ("invalid_training_file", "training file", "training_file"),
    ("invalid_validation_file", "validation file", "validation_file"),
)


@dataclass(slots=True)
class Work:
    """A job that this server runs. `stop` ends its process: it was paused or cancelled, or is another server's."""

    job: Job
    stop: threading.Event = field(default_factory=threading.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)


class _Failed(Exception):
    """The job cannot come to a good end."""

    def __init__(self, code: str, message: str, param: str | None = None, also: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.code, self.message, self.param, self.also = code, message, param, also


class JobRunner:
    """`base_model` names the model that a base serves now. `clock` is the time of day."""

    def __init__(
        self,
        rows: JobRows,
        contents: FileBytes,
        store: Store,
        process: TrainingProcess,
        admission: Admission,
        limits: Limits,
        metrics: FineTuningMetrics,
        *,
        base_model: Callable[[str], str],
        file_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rows, self._contents, self._store, self._process = rows, contents, store, process
        self._admission, self._limits, self._metrics = admission, limits, metrics
        self._base_model, self._file_seconds, self._clock = base_model, file_seconds, clock
        # The process ends with the thread that starts it, so this one lasts.
        self._thread = ThreadPoolExecutor(1, "training")
        self.root = store.root / "finetuning"

    def folder(self, id: str) -> JobFolder:
        return JobFolder(self.root / id)

    async def run(self, work: Work) -> None:
        """To its end, or until it is stopped."""
        job: Job | None = work.job
        try:
            if work.job.status is Status.VALIDATING:
                job = await self._stoppable(work, self._validate, work.job, work)
            if job is None or not await self._train(job, work):
                return
            if admitting := await asyncio.to_thread(self._rows.admit, job.id):
                await self._admit(admitting)
        except _Failed as failed:
            await self._fail(work.job.id, failed)
        except OutOfSpace as full:
            await self._fail(work.job.id, _Failed("insufficient_storage", full.message))
        except OSError as error:
            why = f"the files of the job cannot be written or read: {error.strerror or error}"
            await self._fail(work.job.id, _Failed("storage_error", why))

    async def _stoppable(self, work: Work, run: Callable[..., Result], *arguments: Any) -> Result:
        """What this answers on the thread of the processes; a server that ends stops its process first."""
        running = asyncio.get_running_loop().run_in_executor(self._thread, run, *arguments)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            work.stop.set()
            await asyncio.gather(running, return_exceptions=True)
            raise

    async def _fail(self, id: str, failed: _Failed) -> None:
        fail = self._rows.fail
        if await asyncio.to_thread(fail, id, failed.code, failed.message, failed.param, also=failed.also):
            self._metrics.ended(Status.FAILED)
            await asyncio.to_thread(self.folder(id).remove)

    # Before the training

    def _validate(self, job: Job, work: Work) -> Job | None:
        digests, counts = [], []
        for id, (code, name, param) in zip((job.training_file, job.validation_file), _FILES, strict=True):
            if id is None:
                continue
            try:
                path = self._contents.path(id)
                fewest = FEWEST if param == "training_file" else 1
                checked = self._process.check(path, job.asked.method, fewest, work.stop)
            except NotFound as gone:
                raise _Failed(code, gone.message, param) from gone
            except CannotCheck as error:
                raise _Failed("training_unavailable", error.message) from error
            if checked is None:
                return None
            if checked.problem_count:
                raise _Failed(code, _refusal(name, checked), param, _sentences(checked))
            counts.append(checked.examples)
            with path.open("rb") as file:
                digests.append(file_digest(file, "sha256").hexdigest())
        base = _digest(job.asked.base_model)
        data = digests[0] if len(digests) == 1 else sha256("\n".join(digests).encode()).hexdigest()
        return self._rows.validated(job.id, examples=counts[0], base_digest=base, data_digest=data)

    def _check_base(self, job: Job) -> None:
        """The base is the one that the job was made for."""
        asked = job.asked
        try:
            serves = self._base_model(asked.base)
        except LoradockError as gone:
            raise _Failed("base_model_changed", f"the base {asked.base} is not served any more") from gone
        if _digest(serves) != job.state.base_digest:
            raise _Failed(
                "base_model_changed",
                f"the base {asked.base} is another model than when the job was made: make a new job for it",
                "model",
            )

    async def _parent(self, job: Job) -> Path | None:
        if not job.asked.parent or await asyncio.to_thread((self.folder(job.id).path / "parent").is_dir):
            return None
        try:
            return await self._store.bring(job.asked.parent_digest)
        except NotFound as gone:
            raise _Failed("model_not_found", f"{job.asked.parent}, to go on from, was removed meanwhile") from gone

    # The training

    async def _train(self, job: Job, work: Work) -> bool:
        """Whether it came to its end, and well."""
        try:
            self._admission.caller(job)
        except LoradockError as error:
            raise _Failed("invalid_api_key", error.message) from error
        await asyncio.to_thread(self._check_base, job)
        return await self._stoppable(work, self._trained, job, await self._parent(job), work)

    def _trained(self, job: Job, parent: Path | None, work: Work) -> bool:
        folder = self.folder(job.id)
        self._prepare(job, folder, parent)
        while not work.stop.is_set():
            if folder.adapter:
                return True
            launched = self._rows.launch(job.id)
            if launched is None:
                return False
            if launched.state.launches > LAUNCHES:
                raise _Failed(
                    "training_failed",
                    f"its process ended {LAUNCHES} times without coming further, most likely because the machine has "
                    f"not enough memory: {folder.last_words() or 'it left no word'}",
                )
            left = self._limits.hours * 3600 - launched.state.seconds
            watch = _Watch(self._rows, folder, launched, self._metrics, work.stop)
            ended = self._process.run(folder.path, work.stop, watch.look, max(0.0, left))
            watch.write()
            self._judge(ended, folder)
            if ended.why is Why.STOPPED:
                return False
            if not folder.adapter:
                self._rows.note(job.id, f"The training process ended ({_how(ended)}): it is started again", "warn")
                work.stop.wait(AGAIN_SECONDS)
        return False

    def _prepare(self, job: Job, folder: JobFolder, parent: Path | None) -> None:
        self._contents.check_space(0)
        asked = job.asked
        try:
            train = self._contents.path(job.training_file)
            validation = self._contents.path(job.validation_file) if job.validation_file else None
            folder.prepare(job, folder_of(asked.base_model), train, validation, parent)
        except NotFound as gone:
            raise _Failed("invalid_training_file", gone.message) from gone
        except ConfigError as error:
            raise _Failed("base_model_changed", error.message) from error

    def _judge(self, ended: Ended, folder: JobFolder) -> None:
        """_Failed, if another start would end like this one."""
        if ended.why is Why.OVERTIME:
            raise _Failed("timeout", f"it trained for {self._limits.hours:g} hours, which is the most: train on less")
        if ended.why is Why.ENDED and ended.code in (1, 2, 3) and not folder.adapter:
            why = folder.error() or folder.last_words() or f"its process ended with {ended.code}"
            raise _Failed("training_failed", f"The job failed while training: {why}")

    # After it

    async def _admit(self, job: Job) -> None:
        folder = self.folder(job.id)
        adapter = await asyncio.to_thread(lambda: folder.adapter)
        assert adapter is not None
        await asyncio.to_thread(self._check_base, job)
        settled = await asyncio.to_thread(folder.settled)
        try:
            await self._admission.try_out(job, adapter)
            checkpoints = await self._checkpoints(job, folder, settled)
            model = await self._admission.admit(job, adapter, settled, final=True)
        except (EngineUnavailable, OutOfSpace):
            raise
        except LoradockError as error:
            problems = tuple(getattr(error, "problems", ())[:TOLD])
            code = "model_rejected" if isinstance(error, AdapterRejected | BadRequest) else error.code or "not_admitted"
            message = f"The model was trained, and is not admitted: {error.message}"
            raise _Failed(code, message, also=problems) from error
        rows = await asyncio.to_thread(self._checkpoint_rows, job, folder, checkpoints, model)
        result = await asyncio.to_thread(self._results, job, folder)
        if await asyncio.to_thread(self._rows.succeed, job.id, model, result, rows, settled):
            self._metrics.ended(Status.SUCCEEDED)
            await asyncio.to_thread(folder.remove)

    async def _checkpoints(self, job: Job, folder: JobFolder, settled: dict[str, object]) -> dict[int, str]:
        """The names of the versions that earlier epochs become, by their steps."""
        there = await asyncio.to_thread(folder.checkpoints)
        *earlier, _ = sorted(there)[-CHECKPOINTS:] or [0]
        names = {step: await self._admission.admitted(job, there[step], settled) for step in earlier}
        return {step: name for step, name in names.items() if name}

    def _checkpoint_rows(self, job: Job, folder: JobFolder, names: dict[int, str], model: str) -> list[Checkpoint]:
        """Of the earlier epochs with these names, and of the last step."""
        now, last, measured = self._clock(), 0, {}
        for line in folder.lines():
            if line["step"] in names:
                measured[line["step"]] = metrics_of(line)
            last, at_last = line["step"], line
        if last:
            names, measured = {**names, last: model}, {**measured, last: metrics_of(at_last)}
        return [Checkpoint(job.id, step, now, name, measured.get(step, {})) for step, name in names.items()]

    def _results(self, job: Job, folder: JobFolder) -> StoredFile:
        """What each step measured, as a file. Written again after a kill, it is the same one."""
        id = "file-" + sha256(f"{job.id} results".encode()).hexdigest()[:24]
        self._contents.check_space(0)
        with self._contents.incoming() as (path, sink):
            nbytes = 0
            for row in folder.results():
                write(sink, row)
                nbytes += len(row)
            sink.flush()
            self._contents.keep(id, path)
        now = self._clock()
        name = "step_metrics.csv"
        return StoredFile(id, job.tenant, job.asked.who, RESULTS, name, nbytes, now, now + self._file_seconds)


class _Watch:
    """Brings progress from the folder into the database, some times a minute."""

    def __init__(
        self, rows: JobRows, folder: JobFolder, job: Job, metrics: FineTuningMetrics, stop: threading.Event
    ) -> None:
        self._rows, self._folder, self._job, self._metrics, self._stop = rows, folder, job, metrics, stop
        self._lines: list[Mapping[str, Any]] = []
        self._seconds = self._unwritten = 0.0

    def look(self, ran: float) -> bool:
        """Whether there was a sign of life."""
        self._seconds += ran
        self._unwritten += ran
        return self._unwritten >= WRITE_SECONDS and (self.write() or self._folder.is_touched())

    def write(self) -> bool:
        new = self._folder.new_lines(self._job.state.step)
        self._lines += new
        self._unwritten = 0.0
        before = self._job.state.tokens
        try:
            settled = self._job.state.settled or self._folder.settled()
            job = self._rows.advance(self._job.id, self._lines, self._seconds, settled)
        except LoradockError as error:  # it is written the next time
            log.warning("progress of %s is not written down: %s", self._job.id, error.message)
            return bool(new)
        if job is None:
            self._stop.set()
            return False
        self._metrics.trained(job.state.tokens - before, self._seconds)
        self._job, self._lines, self._seconds = job, [], 0.0
        return bool(new)


def _digest(model: str) -> str:
    try:
        return digest_of(model)
    except (ConfigError, OSError) as error:
        raise _Failed("base_model_changed", f"the base model cannot be read: {shown(error)}", "model") from error


def _refusal(name: str, checked: Checked) -> str:
    return f"The job failed due to an invalid {name}. {checked.message or _sentences(checked)[0]}"


def _sentences(checked: Checked) -> tuple[str, ...]:
    return tuple(problem.sentence for problem in checked.problems[:TOLD])


def _how(ended: Ended) -> str:
    if ended.why is Why.HUNG:
        return "no step for too long"
    return f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
