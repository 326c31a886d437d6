"""Batches, and which bytes of answers count, in the registry's database, where every server that shares it looks.

One server at a time has the claim of a batch, and only with it a line's answer counts: in one transaction with the
counts. So neither a kill nor a second server can answer a line twice or lose one. All methods block.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, update

from serve.adapters.registry.registry import Registry
from serve.adapters.registry.tables import batch_answers as answers_table
from serve.adapters.registry.tables import batch_parts as parts_table
from serve.adapters.registry.tables import batches as table
from serve.errors import Conflict, NotFound, QuotaExceeded
from serve.jobs.batches.file_rows import check_kept, paged, put
from serve.jobs.batches.objects import OPEN, Batch, Limits, LineError, Page, Status, StoredFile, Usage
from serve.jobs.leases import Claims
from serve.names import shown

# Answers that are read at a time.
_READ = 50


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a line: its line of the output, or of the errors."""

    line: int
    completed: bool
    text: str
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class Part:
    """A file of answers, of which so many bytes count."""

    batch: str
    tenant: str
    name: str
    nbytes: int


class BatchRows:
    """`clock` is the time of day, in seconds; `me` this server's name among those that share the registry."""

    def __init__(self, registry: Registry, limits: Limits, *, me: str, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._limits = limits
        self._me = me
        self._clock = clock
        self._claims = Claims(registry, table, me=me, clock=clock)

    # For clients

    def add(self, batch: Batch) -> None:
        """A new batch; QuotaExceeded if the tenant has as many under way as it may."""
        is_open = (table.c.tenant == batch.tenant, table.c.status.in_(OPEN))
        with self._registry.adding(batch.tenant) as connection:
            count = connection.scalar(select(func.count()).select_from(table).where(*is_open)) or 0
            if count >= self._limits.open:
                raise QuotaExceeded(
                    f"this tenant has {count} batches under way, and {self._limits.open} are the most: wait for one "
                    "of them, or cancel it",
                    code="batch_limit_exceeded",
                )
            check_kept(connection, table, batch.tenant, "batches")
            connection.execute(insert(table).values(_values(batch)))

    def get(self, tenant: str, id: str) -> Batch:
        """NotFound also for another tenant's."""
        query = select(table).where(table.c.id == id, table.c.tenant == tenant)
        with self._registry.reading() as connection:
            row = connection.execute(query).first()
        if row is None:
            raise _missing(id)
        return _batch(row)

    def page(self, tenant: str, *, after: str | None, limit: int) -> Page[Batch]:
        """A tenant's batches, the latest first; from behind the batch `after`."""
        query = select(table).where(table.c.tenant == tenant)
        with self._registry.reading() as connection:
            rows = paged(connection, table, query, tenant, after, limit, ascending=False)
        return Page([_batch(row) for row in rows[:limit]], len(rows) > limit)

    def cancel(self, tenant: str, id: str) -> Batch:
        """Ask no more of its lines; Conflict if it is at its end."""
        with self._registry.adding() as connection:
            batch = self._locked(connection, id)
            if batch is None or batch.tenant != tenant:
                raise _missing(id)
            if batch.status not in (Status.VALIDATING, Status.IN_PROGRESS, Status.CANCELLING):
                raise Conflict(f"Cannot cancel a batch with status '{batch.status}'.", param="id")
            if batch.status is not Status.CANCELLING:
                self._reach(connection, batch, Status.CANCELLING)
        return self.get(tenant, id)

    # Who runs it

    def open(self) -> list[Batch]:
        """Every tenant's that are not at their end, the oldest first."""
        query = select(table).where(table.c.status.in_(OPEN)).order_by(table.c.created, table.c.id)
        with self._registry.reading() as connection:
            return [_batch(row) for row in connection.execute(query)]

    def claim(self, id: str, seconds: float) -> Batch | None:
        """Take the batch for this server alone, for so long; again while it has it. None if another one runs it."""
        row = self._claims.take(id, seconds, OPEN)
        return None if row is None else _batch(row)

    def release(self, id: str | None = None) -> None:
        """The end of a claim; without an id of everybody's claims, where this server is alone."""
        self._claims.release(id)

    # What the server with the claim writes; None or False, if the claim is another's by now

    def begin(self, id: str, total: int) -> Batch | None:
        """The input is in order, and has so many lines."""
        with self._registry.adding() as connection:
            batch = self._claimed(connection, id)
            if batch is None:
                return None
            # Cancelled while it was read: it has its lines, and none is asked.
            connection.execute(update(table).where(table.c.id == id).values(total=total))
            if batch.status is Status.VALIDATING:
                self._reach(connection, batch, Status.IN_PROGRESS)
            return self._locked(connection, id)

    def fail(self, id: str, errors: Sequence[LineError]) -> Status | None:
        """The input is not in order; how the batch ended."""
        with self._registry.adding() as connection:
            batch = self._claimed(connection, id)
            if batch is None:
                return None
            described = json.dumps([error.described() for error in errors])
            connection.execute(update(table).where(table.c.id == id).values(errors=described))
            status = Status.CANCELLED if batch.status is Status.CANCELLING else Status.FAILED
            self._reach(connection, batch, status)
            return status

    def record(self, id: str, answer: Answer, part: str, nbytes: int) -> bool:
        """A line's answer counts: it is in this part, of which so many bytes count now."""
        with self._registry.adding() as connection:
            if self._claimed(connection, id) is None:
                return False
            here = (parts_table.c.batch == id) & (parts_table.c.name == part)
            if not connection.execute(update(parts_table).where(here).values(nbytes=nbytes)).rowcount:
                connection.execute(insert(parts_table).values(batch=id, name=part, nbytes=nbytes))
            more = {
                "completed": int(answer.completed),
                "failed": int(not answer.completed),
                "prompt_tokens": answer.usage.prompt,
                "cached_tokens": answer.usage.cached,
                "generated_tokens": answer.usage.generated,
            }
            added = {name: table.c[name] + count for name, count in more.items()}
            connection.execute(update(table).where(table.c.id == id).values(added))
        return True

    def recount(self, id: str, completed: int, failed: int) -> None:
        """So many answers are there still."""
        with self._registry.adding() as connection:
            if self._claimed(connection, id) is not None:
                values = {"completed": completed, "failed": failed}
                connection.execute(update(table).where(table.c.id == id).values(values))

    def finalizing(self, id: str) -> Batch | None:
        """No more lines are asked; its files are about to be written."""
        with self._registry.adding() as connection:
            batch = self._claimed(connection, id)
            if batch is not None and batch.status in (Status.VALIDATING, Status.IN_PROGRESS):
                self._reach(connection, batch, Status.FINALIZING)
                batch = self._locked(connection, id)
            return batch

    def finish(
        self,
        id: str,
        status: Status,
        unanswered: int,
        output: StoredFile | None,
        error: StoredFile | None,
        errors: Sequence[LineError] = (),
    ) -> bool:
        """The batch is at its end, and its files are there: from now on they hold the answers. `errors` say why it did
        not come further."""
        with self._registry.adding() as connection:
            batch = self._claimed(connection, id)
            if batch is None:
                return False
            for file in filter(None, (output, error)):
                put(connection, file)
            values = {
                "output_file": output.id if output else None,
                "error_file": error.id if error else None,
                "failed": table.c.failed + unanswered,
                "errors": json.dumps([error.described() for error in errors]),
                "claimed_by": None,
                "claimed_until": None,
            }
            connection.execute(update(table).where(table.c.id == id).values(values))
            self._reach(connection, batch, status)
            for answered in (answers_table, parts_table):
                connection.execute(delete(answered).where(answered.c.batch == id))
        return True

    # What was answered

    def parts(self, id: str) -> list[Part]:
        """The batch's."""
        return list(self.all_parts(parts_table.c.batch == id))

    def all_parts(self, *where: Any) -> Iterator[Part]:
        """Of all batches that are not at their end."""
        query = select(parts_table, table.c.tenant).join(table, table.c.id == parts_table.c.batch).where(*where)
        with self._registry.reading() as connection:
            rows = connection.execute(query.order_by(parts_table.c.name)).all()
        return (Part(row.batch, row.tenant, row.name, row.nbytes) for row in rows)

    def old_lines(self, id: str) -> list[tuple[int, bool]]:
        """The lines that were answered by a loradock that kept answers in rows, and whether they were completed."""
        query = select(answers_table.c.line, answers_table.c.completed).where(answers_table.c.batch == id)
        with self._registry.reading() as connection:
            return [(row.line, row.completed) for row in connection.execute(query)]

    def old_answers(self, id: str, *, completed: bool) -> Iterator[tuple[int, str]]:
        """Their answers, by line; some at a time are in memory."""
        here, last = answers_table, 0
        while True:
            where = (here.c.batch == id, here.c.completed == completed, here.c.line > last)
            query = select(here.c.line, here.c.answer).where(*where).order_by(here.c.line).limit(_READ)
            with self._registry.reading() as connection:
                rows = connection.execute(query).all()
            if not rows:
                return
            last = rows[-1].line
            yield from ((row.line, row.answer) for row in rows)

    def forget_before(self, when: float) -> None:
        """Drop batches that were made before this and are at their end."""
        with self._registry.adding() as connection:
            connection.execute(delete(table).where(table.c.created < when, table.c.status.not_in(OPEN)))

    def _claimed(self, connection: Connection, id: str) -> Batch | None:
        """The batch, which nobody else changes until the transaction ends; None if this server has no claim to it."""
        return self._locked(connection, id, (table.c.claimed_by == self._me) & table.c.status.in_(OPEN))

    def _locked(self, connection: Connection, id: str, *where: Any) -> Batch | None:
        row = connection.execute(select(table).where(table.c.id == id, *where).with_for_update()).first()
        return None if row is None else _batch(row)

    def _reach(self, connection: Connection, batch: Batch, status: Status) -> None:
        times = json.dumps({**batch.times, status.value: self._clock()})
        connection.execute(update(table).where(table.c.id == batch.id).values(status=status.value, times=times))


def _missing(id: str) -> NotFound:
    return NotFound(f"No batch found with id '{shown(id)}'.", param="id")


# Columns that are the fields of a Batch as they are.
_PLAIN = (
    *("id", "tenant", "key", "who", "endpoint", "input_file", "completion_window", "created", "expires"),
    *("file_seconds", "total", "completed", "failed", "output_file", "error_file"),
)


def _values(batch: Batch) -> dict[str, Any]:
    plain = {name: getattr(batch, name) for name in _PLAIN}
    usage = batch.usage
    return {
        **plain,
        "status": batch.status.value,
        "metadata": json.dumps(None if batch.metadata is None else dict(batch.metadata)),
        "times": json.dumps(dict(batch.times)),
        "errors": json.dumps([error.described() for error in batch.errors]),
        "prompt_tokens": usage.prompt,
        "cached_tokens": usage.cached,
        "generated_tokens": usage.generated,
    }


def _batch(row: Any) -> Batch:
    return Batch(
        **{name: getattr(row, name) for name in _PLAIN},
        status=Status(row.status),
        # By the column: a row has an attribute `metadata` of its own in some versions of SQLAlchemy.
        metadata=json.loads(row._mapping[table.c.metadata]),
        times=json.loads(row.times),
        errors=[LineError(**error) for error in json.loads(row.errors)],
        usage=Usage(row.prompt_tokens, row.cached_tokens, row.generated_tokens),
    )
