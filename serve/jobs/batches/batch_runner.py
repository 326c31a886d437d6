"""Runs one batch from where it stands to its end: its input is checked, its lines are asked, its files are written.

Where it stands is what the database holds, so that a restart or another server goes on there.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256

import msgspec

from serve.adapters.byte_ledger import Kind, Room
from serve.errors import EngineUnavailable, LoradockError, NotFound, Overloaded, QuotaExceeded, RateLimited
from serve.gateway.internal_request import BrokeOff
from serve.gateway.moderation import NoVerdict
from serve.jobs.batches.answers import AnswerFiles, BatchAnswers
from serve.jobs.batches.batch_rows import Answer, BatchRows
from serve.jobs.batches.files import Files
from serve.jobs.batches.input_file import Line, check, requests
from serve.jobs.batches.line_runner import LineAnswer, LineRunner, Stopped
from serve.jobs.batches.metrics import BatchMetrics
from serve.jobs.batches.objects import OUTPUT, Batch, LineError, Status, StoredFile, Usage

log = logging.getLogger(__name__)

# A line in whose answer the engine died so often, or of which its guard gave no verdict, is given up: it may be why.
ATTEMPTS = 5
# A line that is refused for now is asked again after this at the latest; so is the database.
PAUSE_SECONDS, RECORD_SECONDS = 30.0, 1.0
# What JSON may hold as it is, and what Python's splitlines takes for the end of a line.
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
QUOTA = "quota_exceeded"
# What becomes of lines that were not asked before the end.
_UNASKED = {
    Status.EXPIRED: ("batch_expired", "This request could not be executed before the completion window expired."),
    Status.CANCELLED: ("batch_cancelled", "This batch was cancelled before this request was executed."),
}


@dataclass(slots=True)
class Work:
    """A batch that this server runs. `stop` is set when no more lines are asked, `lost` when another server has it;
    `full` says why no more answers can be kept."""

    batch: Batch
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False
    full: str = ""

    async def pause(self, seconds: float) -> None:
        """So long, or until `stop`."""
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            pass


class BatchRunner:
    """`clock` is the time of day."""

    def __init__(
        self,
        rows: BatchRows,
        files: Files,
        answers: AnswerFiles,
        lines: LineRunner,
        metrics: BatchMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rows = rows
        self._files = files
        self._answers = answers
        self._lines = lines
        self._metrics = metrics
        self._clock = clock

    async def run(self, work: Work) -> None:
        """To its end, or until it is lost."""
        batch: Batch | None = work.batch
        if work.batch.status in (Status.VALIDATING, Status.CANCELLING) and not work.batch.total:
            batch = await self._check(work.batch)
        if batch is None or batch.status not in (Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING):
            return
        answers = await asyncio.to_thread(self._answers.of, batch)
        try:
            if batch.status is Status.IN_PROGRESS and self._clock() < batch.expires:
                await self._answer_lines(batch, answers, work)
            if not work.lost:
                await self._finish(batch.id, answers, work)
        finally:
            await asyncio.shield(asyncio.to_thread(answers.close))

    async def _check(self, batch: Batch) -> Batch | None:
        """The batch with its lines counted; None if its input is not in order, and it has failed."""
        try:
            path = await asyncio.to_thread(self._files.contents.path, batch.input_file)
            total, errors = await asyncio.to_thread(check, path, batch.endpoint, self._files.limits)
        except NotFound as gone:
            total, errors = 0, [LineError("invalid_input_file", gone.message, param="input_file_id")]
        if errors:
            if status := await asyncio.to_thread(self._rows.fail, batch.id, errors):
                self._metrics.ended(status)
            return None
        return await asyncio.to_thread(self._rows.begin, batch.id, total)

    async def _answer_lines(self, batch: Batch, answers: BatchAnswers, work: Work) -> None:
        path = await asyncio.to_thread(self._files.contents.path, batch.input_file)
        left, reading = requests(path, batch.endpoint, self._files.limits, set(answers.lines)), asyncio.Lock()

        async def ask_lines() -> None:
            while not work.stop.is_set():
                async with reading:
                    line = await asyncio.to_thread(_next, left)
                if line is None:
                    return
                if (answer := await self._ask(batch, line, work)) is not None:
                    await self._record(batch, answers, answer, work)

        try:
            async with asyncio.TaskGroup() as asking:
                for _ in range(self._files.limits.concurrency):
                    asking.create_task(ask_lines())
        finally:
            await asyncio.shield(asyncio.to_thread(_close, left))

    async def _ask(self, batch: Batch, line: Line, work: Work) -> Answer | None:
        """What becomes of a line; None if the batch stops before that is known."""
        attempts = 0
        if line.error:
            return _failed(line, "invalid_request", line.error)
        while not work.stop.is_set():
            try:
                asked = self._lines.ask(batch.key, batch.tenant, batch.endpoint, line.body, work.stop.is_set)
                return _answered(line, await asked)
            except Stopped:
                return None
            except (BrokeOff, NoVerdict) as error:
                attempts += 1
                if attempts == ATTEMPTS:
                    return _answered(line, LineAnswer.of(error))
                wait = 1.0
            except (RateLimited, Overloaded, EngineUnavailable) as later:
                wait = float(later.retry_after)
            except LoradockError as error:
                return _answered(line, LineAnswer.of(error))
            except Exception:  # whatever a line brings about, the others are answered
                log.exception("line %d of %s failed", line.number, batch.id)
                return _failed(line, "internal_error", "The server failed at this request: its log says more.")
            await work.pause(min(wait, PAUSE_SECONDS))
        return None

    async def _record(self, batch: Batch, answers: BatchAnswers, answer: Answer, work: Work) -> None:
        """Keep the answer; while the disk or the database does not take it, try again for as long as the batch is this
        server's. Where the tenant has no room for it, the batch ends."""
        while not (work.lost or work.full):
            try:
                if await asyncio.to_thread(answers.keep, answer):
                    self._metrics.counted("completed" if answer.completed else "failed", 1)
                else:
                    work.lost = True
                    work.stop.set()
                return
            except QuotaExceeded as full:
                work.full = full.message
                work.stop.set()
            except LoradockError as error:
                log.warning("an answer of %s is not kept yet: %s", batch.id, error.message)
                await asyncio.sleep(RECORD_SECONDS)

    async def _finish(self, id: str, answers: BatchAnswers, work: Work) -> None:
        batch = await asyncio.to_thread(self._rows.finalizing, id)
        if batch is None:
            return
        status, unanswered = await asyncio.to_thread(self._close_books, batch, answers, work.full)
        if status is None:
            return
        self._metrics.ended(status)
        if unanswered and status in _UNASKED:
            self._metrics.counted(status.value, unanswered)

    def _close_books(self, batch: Batch, answers: BatchAnswers, full: str) -> tuple[Status | None, int]:
        """Write the files, and the batch's end, and how many lines were never asked; None if another server did."""
        unanswered = batch.total - batch.completed - batch.failed
        status = Status.COMPLETED if unanswered == 0 else Status.EXPIRED
        if batch.status is Status.CANCELLING:
            status = Status.CANCELLED
        elif unanswered and full:
            status = Status.FAILED
        why = [LineError(QUOTA, f"{unanswered} requests were not answered: {full}")] if status is Status.FAILED else []
        self._files.ledger.check_disk(batch.tenant)
        with self._files.ledger.room(batch.tenant, Kind.FILES) as room:  # until the files have their rows
            error = self._write(batch, "error", self._errors(batch, answers, status, unanswered, room))
            output = self._write(batch, "output", room.taken(_lines(answers.answers(completed=True))))
            parts = answers.parts()
            if not self._rows.finish(batch.id, status, unanswered, output, error, why):
                return None, 0
        answers.close()
        self._answers.remove(batch.id, parts)
        return status, unanswered

    def _errors(
        self, batch: Batch, answers: BatchAnswers, status: Status, unanswered: int, room: Room
    ) -> Iterator[bytes]:
        """Of lines that failed; and of those that were not asked, as far as the tenant has room for them."""
        yield from room.taken(_lines(answers.answers(completed=False)))
        if not unanswered or status not in _UNASKED:
            return
        try:
            path = self._files.contents.path(batch.input_file)
        except NotFound as gone:
            log.error("%s ends without a word to %d lines: %s", batch.id, unanswered, gone.message)
            return
        left = requests(path, batch.endpoint, self._files.limits, answers.lines)
        for data in _lines(_failed(line, *_UNASKED[status]).text for line in left):
            try:
                room.take(len(data))
            except QuotaExceeded as full:
                log.warning("%s ends without a word to some of %d lines: %s", batch.id, unanswered, full.message)
                return
            yield data

    def _write(self, batch: Batch, kind: str, lines: Iterator[bytes]) -> StoredFile | None:
        """A file of the batch; None for one without lines. Written again after a kill, it is the same file."""
        id = "file-" + sha256(f"{batch.id} {kind}".encode()).hexdigest()[:24]
        nbytes = self._files.compose(id, lines)
        if not nbytes:
            return None
        now = self._clock()
        name = f"{batch.id}_{kind}.jsonl"
        return StoredFile(id, batch.tenant, batch.who, OUTPUT, name, nbytes, now, now + batch.file_seconds)


def _answered(line: Line, answer: LineAnswer) -> Answer:
    response = {"status_code": answer.status, "request_id": answer.request_id, "body": msgspec.Raw(answer.body)}
    return Answer(line.number, answer.status == 200, _text(line, response, None), answer.usage)


def _failed(line: Line, code: str, message: str) -> Answer:
    """A line that got no answer over HTTP."""
    return Answer(line.number, False, _text(line, None, {"code": code, "message": message}), Usage())


def _text(line: Line, response: object, error: object) -> str:
    fields = {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": line.custom_id}
    return msgspec.json.encode({**fields, "response": response, "error": error}).decode().translate(_LINE_ENDS)


def _lines(texts: Iterable[str]) -> Iterator[bytes]:
    for text in texts:
        yield text.encode() + b"\n"


def _next(lines: Iterator[Line]) -> Line | None:
    return next(lines, None)


def _close(lines: Generator[Line, None, None]) -> None:
    try:
        lines.close()
    except ValueError:
        pass  # a step is under way on a thread that nobody waits for any more; its file closes with it
