"""A job's training over its folder, until the adapter is there: started again after deaths, told of as it goes on.

It runs where the folder is: on a server, or on a machine that fetched the job from one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from serve.errors import LoradockError, QuotaExceeded
from serve.jobs.finetuning.job_folder import JobFolder
from serve.jobs.finetuning.objects import Job
from serve.jobs.finetuning.training_process import Ended, TrainingProcess, Why

log = logging.getLogger(__name__)

# Starts of a process in a row that came to no new step: then it is given up.
LAUNCHES = 8
AGAIN_SECONDS = 1.0
# Progress is written down so often.
WRITE_SECONDS = 2.0


class Failed(Exception):
    """The job cannot come to a good end."""

    def __init__(self, code: str, message: str, param: str | None = None, also: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.also = also


class Rows(Protocol):
    """Where a training is written down; None once the job is not to be trained here any more."""

    def launch(self, id: str, /) -> Job | None: ...

    def advance(
        self, id: str, lines: Sequence[Mapping[str, Any]], seconds: float, settled: Mapping[str, Any], /
    ) -> Job | None: ...

    def note(self, id: str, message: str, level: str = "info", /) -> None: ...


class Trainer:
    """`hours` is what a job may train; `trained` hears of tokens and seconds. `measure` looks at the size of its folder
    now and then: QuotaExceeded, if its tenant has no room for it."""

    def __init__(
        self,
        rows: Rows,
        process: TrainingProcess,
        hours: float,
        trained: Callable[[int, float], None] = lambda tokens, seconds: None,
        measure: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self._rows = rows
        self._process = process
        self._hours = hours
        self._heard, self._measure = trained, measure

    def run(self, job: Job, folder: JobFolder, stop: threading.Event) -> bool:
        """Whether the adapter is there; Failed, if it cannot be. Blocks, on a thread that outlives the process."""
        if folder.adapter:
            # Its server or worker may have been killed before the last steps were written down.
            _Watch(self._rows, folder, job, self._heard, stop).settle()
        while not stop.is_set():
            if folder.adapter:
                return True
            launched = self._rows.launch(job.id)
            if launched is None:
                return False
            if launched.state.launches > LAUNCHES:
                raise Failed(
                    "training_failed",
                    f"its process ended {LAUNCHES} times without coming further, most likely because the machine has "
                    f"not enough memory: {folder.last_words() or 'it left no word'}",
                )
            left = self._hours * 3600 - launched.state.seconds
            watch = _Watch(self._rows, folder, launched, self._heard, stop, self._measured)
            ended = self._process.run(folder.path, stop, watch.look, max(0.0, left))
            watch.settle()
            self._judge(ended, folder)
            if ended.why is Why.STOPPED:
                return False
            if not folder.adapter:
                self._rows.note(job.id, f"The training process ended ({_how(ended)}): it is started again", "warn")
                stop.wait(AGAIN_SECONDS)
        return False

    def _measured(self, job: Job) -> None:
        try:
            self._measure(job)
        except QuotaExceeded as full:
            raise Failed(full.code or "byte_limit_exceeded", f"The training was ended: {full.message}") from full

    def _judge(self, ended: Ended, folder: JobFolder) -> None:
        """Failed, if another start would end like this one."""
        if ended.why is Why.OVERTIME:
            raise Failed("timeout", f"it trained for {self._hours:g} hours, which is the most: train on less")
        gave_up = ended.why is Why.ENDED and ended.code in (1, 2, 3) and not folder.adapter
        if gave_up and not folder.lacked_memory():
            why = folder.error() or folder.last_words() or f"its process ended with {ended.code}"
            raise Failed("training_failed", f"The job failed while training: {why}")


class _Watch:
    """Brings progress from the folder to where it is written down, some times a minute."""

    def __init__(
        self,
        rows: Rows,
        folder: JobFolder,
        job: Job,
        trained: Callable[[int, float], None],
        stop: threading.Event,
        measure: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self._rows = rows
        self._folder = folder
        self._job = job
        self._trained = trained
        self._stop = stop
        self._measure = measure
        self._lines: list[Mapping[str, Any]] = []
        self._seconds = self._unwritten = 0.0
        self._behind = False

    def look(self, ran: float) -> bool:
        """Whether there was a sign of life."""
        self._seconds += ran
        self._unwritten += ran
        if self._unwritten < WRITE_SECONDS:
            return False
        self._measure(self._job)
        return self.write() or self._folder.is_touched()

    def settle(self) -> None:
        """Write what is left, however long that takes, unless the job is not to be trained here any more."""
        self.write()
        while self._behind and not self._stop.wait(AGAIN_SECONDS):
            self.write()

    def write(self) -> bool:
        new = self._folder.new_lines(self._job.state.step)
        self._lines += new
        self._unwritten = 0.0
        before = self._job.state.tokens
        try:
            settled = self._job.state.settled or self._folder.settled()
            job = self._rows.advance(self._job.id, self._lines, self._seconds, settled)
        except LoradockError as error:  # it is written the next time
            self._behind = True
            log.warning("progress of %s is not written down: %s", self._job.id, error.message)
            return bool(new)
        self._behind = False
        if job is None:
            self._stop.set()
            return False
        self._trained(job.state.tokens - before, self._seconds)
        self._job = job
        self._lines = []
        self._seconds = 0.0
        return bool(new)


def _how(ended: Ended) -> str:
    if ended.why is Why.HUNG:
        return "no step for too long"
    return f"signal {-ended.code}" if ended.code < 0 else f"exit code {ended.code}"
