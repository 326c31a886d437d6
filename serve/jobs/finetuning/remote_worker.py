"""A machine that trains the fine-tuning jobs of a server: it fetches one, trains it, and brings back what it made.

FOLDER/name      by which the server knows this machine; with it a worker that starts again goes on where it was
FOLDER/jobs/ID   the folder of a job (serve.jobs.finetuning.job_folder), until the job is over
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from serve.adapters.adapter import FILES
from serve.client.api_client import Unreachable
from serve.client.fine_tuning_work_client import WorkClient
from serve.errors import BadRequest, Conflict, EngineUnavailable, Forbidden, LoradockError, Unauthorized
from serve.files import write_whole
from serve.jobs.finetuning.job_folder import JobFolder
from serve.jobs.finetuning.job_runner import CHECKPOINTS
from serve.jobs.finetuning.objects import Job
from serve.jobs.finetuning.trainer import Failed, Trainer
from serve.jobs.finetuning.training_process import TrainingProcess
from serve.jobs.finetuning.worker_files import PARENT, TRAINING, VALIDATION
from serve.models.checkpoint import digest_of, find, folder_of
from serve.models.hardware import node

log = logging.getLogger("loradock")

# A server without a job is asked again after this; a job that could not be trained here is left alone for longer.
LOOK_SECONDS, PAUSE_SECONDS = 5.0, 60.0
RENEW_SECONDS = 10.0


class Bases:
    """The models that this machine has, by the digests of their bytes."""

    def __init__(self, models: Mapping[str, Path]) -> None:
        self.by_digest = dict(models)

    @classmethod
    def of(cls, models: list[str], cache_dir: Path) -> Bases:
        """Of directories, hub ids, or the embedded one; ConfigError for one that is not here."""
        found = {}
        for model in models:
            folder = folder_of(find(model, cache_dir))
            found[digest_of(str(folder))] = folder
            log.info("%s has the digest %s", model, digest_of(str(folder)))
        return cls(found)


def named(folder: Path) -> str:
    """The name of the worker in this folder, made up once."""
    file = folder / "name"
    with suppress(FileNotFoundError):
        return file.read_text().strip()
    host = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in node()).strip("-")
    name = f"{host[:20] or 'worker'}-{secrets.token_hex(4)}"
    write_whole(file, name.encode())
    return name


class Rows:
    """Where a training is written down: at the server. See serve.jobs.finetuning.trainer."""

    def __init__(self, client: WorkClient) -> None:
        self._client = client

    def launch(self, id: str) -> Job | None:
        return _unless_lost(lambda: self._client.launch(id))

    def advance(
        self, id: str, lines: Sequence[Mapping[str, Any]], seconds: float, settled: Mapping[str, Any]
    ) -> Job | None:
        return _unless_lost(lambda: self._client.advance(id, lines, seconds, settled))

    def note(self, id: str, message: str, level: str = "info") -> None:
        with suppress(Conflict):
            self._client.note(id, message, level)


def _unless_lost(ask: Callable[[], dict[str, Any]]) -> Job | None:
    try:
        return msgspec.convert(ask(), Job)
    except Conflict:
        return None


class Worker:
    """One job at a time. `run` belongs on a thread that lasts: the process that trains ends with it."""

    def __init__(
        self,
        client: WorkClient,
        folder: Path,
        bases: Bases,
        process: TrainingProcess | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._bases = bases
        self._clock = clock
        self._jobs = folder / "jobs"
        self.process = process or TrainingProcess()
        self._stopped, self._halt = threading.Event(), threading.Event()
        self._paused: dict[str, float] = {}
        self._told: set[str] = set()

    def stop(self) -> None:
        """Save what is being trained, give the job back, and end."""
        self._stopped.set()
        self._halt.set()

    def run(self, *, once: bool = False) -> None:
        """Until it is stopped; with `once` until there is no job. Blocks."""
        self._jobs.mkdir(mode=0o700, parents=True, exist_ok=True)
        while not self._stopped.is_set():
            try:
                offer = self._client.claim([*self._bases.by_digest], self._kept(), self._not_now())
            except (Unreachable, EngineUnavailable) as away:
                log.warning("%s: asking again in %g s", away.message, LOOK_SECONDS)
                self._stopped.wait(LOOK_SECONDS)
                continue
            for id in offer["ended"]:
                shutil.rmtree(self._jobs / Path(id).name, ignore_errors=True)
            self._tell_missing(offer["missing"])
            if offer["job"] is not None:
                self._work(msgspec.convert(offer["job"], Job), offer["hours"])
            elif once:
                return
            else:
                self._stopped.wait(LOOK_SECONDS)

    def _kept(self) -> list[str]:
        return sorted(path.name for path in self._jobs.iterdir())[:100]

    def _not_now(self) -> list[str]:
        """Jobs that could not be trained here a moment ago."""
        now = self._clock()
        self._paused = {id: until for id, until in self._paused.items() if until > now}
        return [*self._paused][:100]

    def _tell_missing(self, missing: Mapping[str, str]) -> None:
        for base, digest in missing.items():
            if digest not in self._told:
                self._told.add(digest)
                log.warning(
                    "a job waits for the base %s with the digest %s, which is not here: other workers may have it, or "
                    "give its directory with --base",
                    base,
                    digest,
                )

    def _work(self, job: Job, hours: float) -> None:
        folder = JobFolder(self._jobs / job.id)
        self._halt = threading.Event()
        if self._stopped.is_set():
            self._halt.set()
        log.info("%s: training %s on %s", job.id, job.asked.method, job.asked.base)
        try:
            with self._renewed(job.id):
                self._bring_here(job, folder)
                if Trainer(Rows(self._client), self.process, hours).run(job, folder, self._halt):
                    self._deliver(job, folder)
        except Failed as failed:
            log.warning("%s failed: %s", job.id, failed.message)
            with suppress(Conflict):
                self._client.fail(job.id, failed.code, failed.message, failed.param, failed.also)
        except Conflict as lost:
            log.warning("%s", lost.message)
        except (LoradockError, OSError) as error:
            log.warning("%s is not trained here now: %s", job.id, error)
            self._paused[job.id] = self._clock() + PAUSE_SECONDS
        self._given_back(job.id)

    def _given_back(self, id: str) -> None:
        """It is another worker's to train, or this one's again; without an answer its claim ends by itself."""
        try:
            self._client.release(id)
        except LoradockError as error:
            log.warning("the claim of %s ends by itself: %s", id, error.message)

    @contextmanager
    def _renewed(self, id: str) -> Iterator[None]:
        """The claim is renewed until the block ends; once it is lost the training stops.

        While the server is out of reach the training goes on: nobody else can have begun it that it would not say.
        """
        over = threading.Event()

        def renew() -> None:
            while not over.wait(RENEW_SECONDS):
                try:
                    self._client.renew(id)
                except (Conflict, Unauthorized, Forbidden, BadRequest) as lost:  # its key is revoked, say
                    log.warning("the claim of %s is lost: %s", id, lost.message)
                    self._halt.set()
                    return
                except LoradockError as error:
                    log.warning("the claim of %s was not renewed: %s", id, error.message)

        thread = threading.Thread(target=renew, name="renewing", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _bring_here(self, job: Job, folder: JobFolder) -> None:
        """Everything that the job is trained with."""
        folder.path.mkdir(mode=0o700, exist_ok=True)
        train, validation = folder.path / TRAINING, folder.path / VALIDATION
        for file in (train, *([validation] if job.validation_file else [])):
            if not file.is_file():
                self._client.fetch(job.id, file.name, file)
        parent = folder.path / PARENT
        if job.asked.parent and not parent.is_dir():
            aside = folder.path / "fetched"
            aside.mkdir(exist_ok=True)
            for name in FILES:
                self._client.fetch(job.id, PARENT + name, aside / name)
            aside.rename(parent)
        model = self._bases.by_digest[job.state.base_digest]
        folder.prepare(job, model, train, validation if job.validation_file else None, None)

    def _deliver(self, job: Job, folder: JobFolder) -> None:
        adapter, there = folder.adapter, folder.checkpoints()
        assert adapter is not None
        epochs = [there[step] for step in sorted(there)[-CHECKPOINTS:]]
        files = [folder.path / name for name in ("progress.jsonl", "settings.json")]
        files += filter(Path.is_file, [folder.path / "validation.json"])
        files += [path / name for path in (*epochs, adapter) for name in FILES]
        for file in files:
            self._client.bring(job.id, file.relative_to(folder.path).as_posix(), file)
        self._client.done(job.id)
        log.info("%s was trained, and its server admits it", job.id)
